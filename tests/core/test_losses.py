"""VPLLoss against the loops of reference.py, and where the loops say nothing: precision, extremes, bad input."""
import copy
import functools
import itertools
import math
import pickle
import random
import warnings

import pytest
import reference
import torch
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy

from timm_vpl import PairOutput, StagedLoss, VPLLoss
from timm_vpl.core.losses import WeightedCrossEntropy
from timm_vpl.core.terms import Term, base_term, kl_loss, submodel_loss, token_loss

TERMS = ('ce_a_loss', 'ce_b_loss', 'contrastive_loss', 'kl_loss')
LEAVES = ('logits_a', 'logits_b', 'embed_a', 'embed_b', 'stopped_a', 'stopped_b')
SIDES = ('a', 'b', 'both')
WEIGHTS = torch.tensor([0.5, 2., 0., 1., 4.])
ONE_STAGE = {'epochs': 10, 'x': 0, 'y': 0}


def make_output(num_images=4, dim=6, num_classes=5, dtype=torch.float64, seed=0, stopped='', ids=None):
    """Random PairOutput of leaf tensors; stopped names the sides that carry a stopped embedding."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    fields = [leaf(num_images, width) for width in (num_classes, num_classes, dim, dim)]
    # Other values than embed_a/b, so that it shows which of the two is used.
    return PairOutput(*fields, sample_ids=ids, **{f'stopped_{side}': leaf(num_images, dim) for side in stopped})


def make_target(num_images=4, num_classes=5, soft=False, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    if soft:
        return torch.rand(num_images, num_classes, generator=generator, dtype=torch.float64).softmax(1).to(dtype)
    return torch.randint(num_classes, (num_images,), generator=generator)


def make_criterion(**kwargs):
    criterion = VPLLoss(**{**ONE_STAGE, 'tau': 0.2, **kwargs})
    criterion.set_epoch(0)
    return criterion


def leaves_of(output):
    return {name: getattr(output, name) for name in LEAVES if getattr(output, name) is not None}


def gradients(term, leaves):
    """Gradients by leaf name, None where the leaf takes no part."""
    if not term.requires_grad:
        return dict.fromkeys(leaves)
    found = torch.autograd.grad(term, list(leaves.values()), allow_unused=True, retain_graph=True)
    return dict(zip(leaves, found, strict=True))


def assert_close(got, want, what):
    want = torch.as_tensor(want, dtype=torch.float64)
    tolerance = 1e-10 * max(1., float(want.detach().abs().max()))
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance, msg=lambda m: f'{what}: {m}')


def assert_same_gradients(got, want, what):
    for name in want:
        if want[name] is None:
            assert got[name] is None or not got[name].any(), f'{what} reaches {name}'
        else:
            got_leaf = torch.zeros_like(want[name]) if got[name] is None else got[name]
            assert_close(got_leaf, want[name], f'gradient of {what} for {name}')


def learners(term, output):
    """Names of the leaves that get a gradient other than zero."""
    found = gradients(term, leaves_of(output))
    return {name for name, gradient in found.items() if gradient is not None and gradient.any()}


def assert_finite(criterion, output, target):
    terms = criterion.terms(output, target)
    for name, term in terms.items():
        assert torch.isfinite(term), name
        for leaf, gradient in gradients(term, leaves_of(output)).items():
            assert gradient is None or torch.isfinite(gradient).all(), f'gradient of {name} for {leaf}'
    return terms


# values and gradients against the loops

@pytest.mark.parametrize('same_class', ['negative', 'ignore', 'positive'])
@pytest.mark.parametrize('similarity', ['cosine', 'dot'])
@pytest.mark.parametrize('contrastive_to', SIDES)
def test_terms_and_gradients_equal_reference(contrastive_to, similarity, same_class):
    rng = random.Random(f'{contrastive_to} {similarity} {same_class}')
    for i, (soft, copies, with_stopped) in enumerate(itertools.product((False, True), repeat=3)):
        stopped = rng.choice(['a', 'b', 'ab']) if with_stopped else ''
        num_images, dim, num_classes = rng.randint(1, 9), rng.randint(1, 17), rng.randint(2, 12)
        if copies:  # and few classes
            num_images, num_classes = rng.randint(5, 9), rng.randint(2, 3)
        ids = torch.tensor([rng.choice([0, 3, -2, 10 ** 12]) for _ in range(num_images)]) if copies else None
        seed = rng.randrange(10 ** 6)
        output = make_output(num_images, dim, num_classes, seed=seed, stopped=stopped, ids=ids)
        target = make_target(num_images, num_classes, soft, seed)
        if copies and i % 4 == 2:  # of one class, as they are without mixup
            target = target[ids % num_images]
        settings = {
            'tau': rng.uniform(0.05, 2) if similarity == 'cosine' else rng.uniform(1, 50),
            'rho': rng.uniform(0.5, 4), 'similarity': similarity, 'contrastive_to': contrastive_to,
            'kl_to': SIDES[i % 3], 'contrastive_weight': rng.uniform(0.1, 3), 'kl_weight': rng.uniform(0.1, 3),
            'same_class': same_class}
        criterion = make_criterion(**settings)
        got = criterion.terms(output, target)
        want = reference.pair_terms(output, target, **settings)
        assert set(got) == set(want)
        leaves = leaves_of(output)
        for name in want:
            what = f'{name} (N={num_images}, d={dim}, C={num_classes}, soft={soft}, ids={ids}, stopped={stopped!r})'
            assert_close(got[name], want[name], what)
            assert_same_gradients(gradients(got[name], leaves), gradients(want[name], leaves), what)
        assert torch.equal(criterion(output, target), got['loss'])


@pytest.mark.parametrize('settings, scale, target, want', [
    # Orthonormal embeddings, a = b: the partner has similarity 1, the two other images of 2 branches 0.
    ({}, 1, [0, 1], math.log(math.exp(2) + 2) - 2),
    ({}, 3, [0, 1], math.log(math.exp(2) + 2) - 2),
    ({'similarity': 'dot'}, 3, [0, 1], math.log(math.exp(6) + 2) - 6),
    # Two images of one class: each anchor has three candidates, all positives.
    ({'same_class': 'positive'}, 1, [1, 1], math.log(math.exp(2) + 2) - 2 / 3),
])
def test_contrastive_by_hand(settings, scale, target, want):
    eye = torch.eye(2, dtype=torch.float64)
    output = PairOutput(torch.zeros_like(eye), torch.zeros_like(eye), eye.clone(), scale * eye)
    loss = make_criterion(tau=0.5, **settings).terms(output, torch.tensor(target))['contrastive_loss']
    assert float(loss) == pytest.approx(want, abs=1e-12)


def test_kl_by_hand():
    p_b = torch.tensor([[0.5, 0.5], [0.9, 0.1]], dtype=torch.float64)
    p_a = torch.tensor([[0.25, 0.75], [0.9, 0.1]], dtype=torch.float64)
    embed = torch.ones(2, 3, dtype=torch.float64)
    target = torch.tensor([0, 1])
    # Logits of rho * log p: softmax(z / rho) gives p back, and no rho^2 factor may appear.
    output = PairOutput(3 * p_a.log(), 3 * p_b.log(), embed, embed)
    to_a = make_criterion(rho=3.).terms(output, target)['kl_loss']
    assert float(to_a) == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2, abs=1e-12)
    to_b = make_criterion(rho=3., kl_to='b').terms(output, target)['kl_loss']
    assert float(to_b) == pytest.approx((0.25 * math.log(0.5) + 0.75 * math.log(1.5)) / 2, abs=1e-12)


# who learns, where the caller says nothing; otherwise the loops tell

def test_default_directions():
    output = make_output()
    terms = make_criterion().terms(output, make_target())
    assert learners(terms['contrastive_loss'], output) == {'embed_b'}
    assert learners(terms['kl_loss'], output) == {'logits_a'}


# the sum

@pytest.mark.parametrize('off, weights', [
    ({'contrastive_loss'}, {'contrastive_weight': 0}),
    ({'kl_loss'}, {'kl_weight': 0.}),
    ({'contrastive_loss', 'kl_loss'}, {'contrastive_weight': 0., 'kl_weight': 0.}),
])
def test_zero_weight_turns_a_term_off(off, weights):
    output, target = make_output(), make_target()
    terms = make_criterion(**weights).terms(output, target)
    assert set(terms) == {*TERMS, 'loss'} - off
    assert_close(terms['loss'], sum(terms[name] for name in set(TERMS) - off), 'loss')


@pytest.mark.parametrize('name, base_loss, loop', [
    ('smoothing', LabelSmoothingCrossEntropy(0.1), lambda z, y: reference.ce(z, y, 0.1)),
    ('bce', BinaryCrossEntropy(0.1), lambda z, y: reference.binary_ce(z, y, 0.1)),
    ('bce soft', BinaryCrossEntropy(0.1), lambda z, y: reference.binary_ce(z, y, 0.1)),
    ('weights', WeightedCrossEntropy(WEIGHTS), lambda z, y: reference.ce(z, y, 0., WEIGHTS.tolist())),
    ('weights smooth', WeightedCrossEntropy(WEIGHTS, 0.1), lambda z, y: reference.ce(z, y, 0.1, WEIGHTS.tolist())),
    ('weights soft', WeightedCrossEntropy(WEIGHTS), lambda z, y: reference.ce(z, y, 0., WEIGHTS.tolist())),
    ('bce weights', BinaryCrossEntropy(0.1, weight=WEIGHTS), lambda z, y: reference.binary_ce(
        z, y, 0.1, WEIGHTS.tolist())),
    ('function', lambda z, y: (z * z).mean(), lambda z, y: (z * z).sum() / z.numel()),
])
def test_base_loss_serves_both_branches(name, base_loss, loop):
    output, target = make_output(), make_target(soft=name.endswith('soft'))
    terms = make_criterion(base_loss=base_loss).terms(output, target)
    leaves = leaves_of(output)
    for side in 'ab':
        want = loop(leaves[f'logits_{side}'], target)
        assert_close(terms[f'ce_{side}_loss'], want, name)
        assert_same_gradients(gradients(terms[f'ce_{side}_loss'], leaves), gradients(want, leaves), name)
    assert_close(terms['loss'], sum(terms[term] for term in TERMS), 'loss')


# stages

@pytest.mark.parametrize('epochs, x, y, epoch, on', [
    (10, 20, 20, 1, {'contrastive_loss'}),
    (10, 20, 20, 2, {'contrastive_loss', 'kl_loss'}),
    (10, 20, 20, 1000, {'kl_loss'}),
    (10, 100, 0, 10, {'contrastive_loss'}),
])
def test_terms_by_stage(epochs, x, y, epoch, on):
    output, target = make_output(stopped='a'), make_target()
    criterion = VPLLoss(epochs, x, y, tau=0.2)
    criterion.set_epoch(10 ** 6)  # an epoch chosen before leaves nothing behind
    criterion.set_epoch(epoch)
    terms = criterion.terms(output, target)
    assert set(terms) == {'ce_a_loss', 'ce_b_loss', 'loss', *on}
    want = reference.pair_terms(output, target, 0.2)
    assert_close(terms['loss'], sum(want[name] for name in terms if name != 'loss'), 'loss')
    assert torch.equal(criterion(output, target), terms['loss'])


@pytest.mark.parametrize('value', [float('inf'), float('nan')])
def test_what_a_stage_does_not_use_cannot_spoil_it(value):
    output, target = make_output(stopped='a'), make_target()
    spoiled = torch.full((4, 6), value, dtype=torch.float64)
    output = output._replace(**{
        name: spoiled.clone().requires_grad_() for name in ('embed_a', 'embed_b', 'stopped_a')})
    criterion = VPLLoss(10, 20, 20, tau=0.2)
    criterion.set_epoch(9)
    assert_finite(criterion, output, target)
    assert_finite(make_criterion(contrastive_weight=0), output, target)


def test_no_epoch_warns_once_and_counts_as_the_first():
    output, target = make_output(), make_target()
    criterion = VPLLoss(10, 20, 20, tau=0.2)
    with warnings.catch_warnings():  # not in evaluation, such as Lightning's sanity check
        warnings.simplefilter('error')
        value = criterion.eval()(output, target).detach()
        with torch.no_grad():
            assert torch.equal(criterion.train()(output, target), value)
        make_criterion()(output, target)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        terms = criterion.terms(output, target)
        assert torch.equal(criterion(output, target).detach(), value)
    assert [warning.category for warning in caught] == [UserWarning]
    assert 'epoch' in str(caught[0].message)
    assert set(terms) == {'ce_a_loss', 'ce_b_loss', 'contrastive_loss', 'loss'}


# precision

@pytest.mark.parametrize('soft', [False, True])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_gives_float32(dtype, soft):
    output = make_output(6, 16, dtype=dtype, stopped='a')
    target = make_target(6, soft=soft, dtype=torch.float32)
    terms = make_criterion().terms(output, target)
    exact = PairOutput(*(None if field is None else field.detach().double() for field in output))
    want = make_criterion().terms(exact, target.double() if soft else target)
    for name, term in terms.items():
        assert term.dtype == torch.float32, name
        # The inputs are rounded, the computation is not: float32's accuracy, not that of the inputs.
        assert float(term.detach()) == pytest.approx(float(want[name]), rel=2e-5, abs=2e-6), name
    for leaf, gradient in gradients(terms['loss'], leaves_of(output)).items():
        assert gradient is None or gradient.dtype == dtype, leaf


@pytest.mark.parametrize('similarity', ['cosine', 'dot'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32, torch.float64])
def test_autocast_changes_nothing(dtype, similarity):
    output, target = make_output(6, 64, dtype=dtype), make_target(6)
    criterion = make_criterion(similarity=similarity)
    want = criterion.terms(output, target)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        got = criterion.terms(output, target)
    for name in want:
        assert got[name].dtype == (torch.float64 if dtype == torch.float64 else torch.float32), name
        assert torch.equal(got[name], want[name]), name
    got_gradients = gradients(got['loss'], leaves_of(output))
    for name, gradient in gradients(want['loss'], leaves_of(output)).items():
        assert gradient is None or torch.equal(got_gradients[name], gradient), name


# extremes

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
MODES = list(itertools.product(('cosine', 'dot'), ('negative', 'ignore', 'positive')))


@pytest.mark.parametrize('similarity, same_class', MODES)
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('target', [[1], [0, 1, 1, 2]], ids=['one image', 'copies of one'])
def test_no_negatives(target, dtype, similarity, same_class):
    output = make_output(len(target), dtype=dtype, ids=torch.full((len(target),), 5))
    criterion = make_criterion(similarity=similarity, same_class=same_class, contrastive_to='both')
    terms = assert_finite(criterion, output, torch.tensor(target))
    if len(target) == 1 or same_class != 'positive':
        assert float(terms['contrastive_loss'].detach()) == 0.
        assert not learners(terms['contrastive_loss'], output)


def duplicated(output):
    return PairOutput(*(field.detach()[:1].repeat(4, 1).requires_grad_() for field in output[:4]))


def large_embeddings(output):
    """Each dot product is up to 200 * 200 * 768 = 3e7, each squared norm too: beyond float16."""
    embeds = [torch.where(torch.arange(4 * 768).view(4, 768) % k > 0, 200., -200.) for k in (3, 10 ** 6)]
    return output._replace(**{
        f'embed_{side}': embed.to(output.logits_a.dtype).requires_grad_()
        for side, embed in zip('ab', embeds, strict=True)})


def extreme_logits(output):
    sharp = torch.full_like(output.logits_b, -1e4).index_fill_(1, torch.tensor([2]), 1e4)
    return output._replace(logits_a=1e4 * output.logits_a.sign(), logits_b=sharp)


EXTREMES = {
    'duplicated images': duplicated,
    'branches that agree': lambda output: duplicated(output)._replace(embed_b=duplicated(output).embed_a),
    'large embeddings': large_embeddings,
    'extreme logits': extreme_logits,
    'one vanished embedding': lambda output: output._replace(
        embed_a=output.embed_a * torch.tensor([1, 0, 1, 1])[:, None]),
    'no embeddings': lambda output: output._replace(embed_a=0 * output.embed_a, embed_b=0 * output.embed_b),
}


@pytest.mark.parametrize('similarity, same_class', MODES)
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('name', EXTREMES)
def test_extremes(name, dtype, similarity, same_class):
    output = EXTREMES[name](make_output(dtype=dtype))
    output = PairOutput(*(None if field is None else field.detach().requires_grad_() for field in output))
    soft = make_target(soft=True, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for i, target in enumerate((torch.tensor([0, 1, 1, 2]), torch.tensor([2, 2, 2, 2]), soft)):
        # Each target with another setting for each name.
        tau, rho, to = ((0.2, 1., 'both'), (1., 0.5, 'a'), (128., 1., 'b'))[(i + list(EXTREMES).index(name)) % 3]
        settings = {'tau': tau, 'similarity': similarity, 'same_class': same_class, 'contrastive_to': to}
        criterion = make_criterion(rho=rho, kl_to=to, **settings)
        terms = assert_finite(criterion, output, target)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            assert_finite(criterion, output, target)
        if same_class == 'ignore' and target.ndim == 1 and (target == 2).all():
            assert float(terms['contrastive_loss'].detach()) == 0.
        if dtype == torch.float64 and 'embedding' in name and 'large' not in name:
            want = reference.pair_contrastive(output, target, **settings)
            assert_close(terms['contrastive_loss'], want, 'contrastive_loss')


# bad input

@pytest.mark.parametrize('name, value', [
    ('tau', 0), ('tau', -0.1), ('tau', math.nan), ('rho', 0.), ('rho', -2), ('rho', math.nan),
    ('similarity', 'euclidean'), ('contrastive_to', 'c'), ('contrastive_to', None), ('kl_to', 'ab'),
    ('same_class', 'drop'), ('contrastive_loss', -1), ('contrastive_loss', math.nan), ('kl_loss', -0.5),
    ('kl_loss', math.nan), ('epochs', 0), ('x', -1), ('y', 101), ('x', math.nan)])
def test_bad_arguments(name, value):
    with pytest.raises(ValueError, match=rf'\b{name}\b.*{value}'):
        VPLLoss(**{**ONE_STAGE, name.replace('_loss', '_weight'): value})


def test_negative_epoch():
    criterion = make_criterion()
    with pytest.raises(ValueError, match='epoch.*-1'):
        criterion.set_epoch(-1)
        criterion(make_output(), make_target())


def leaf(*shape):
    return torch.ones(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize('changes, sizes, target', [
    *(({name: leaf(*shape)}, sizes, make_target()) for name, shape, sizes in (
        ('embed_b', (4, 7), '67'), ('embed_a', (4, 1), '16'), ('embed_a', (3, 6), '34'), ('embed_b', (1, 6), '14'),
        ('logits_a', (3, 5), '34'), ('logits_b', (1, 5), '14'))),
    ({'sample_ids': torch.zeros(1, dtype=torch.int64)}, '14', make_target()),
    *(({}, f'4{n}', make_target(n, soft=soft)) for n in (1, 3) for soft in (False, True))])
def test_mismatched_shapes(changes, sizes, target):
    with pytest.raises(ValueError) as error:
        make_criterion()(make_output()._replace(**changes), target)
    for size in sizes:
        assert size in str(error.value)


@pytest.mark.parametrize('output', [torch.randn(4, 5), (torch.randn(4, 5), torch.randn(4, 5))], ids=['one', 'two'])
def test_plain_logits_are_told_what_to_wrap(output):
    criterion = make_criterion()
    with pytest.raises(ValueError, match=rf'got a {type(output).__name__}, expected a PairOutput.* PairWrapper\('):
        criterion(output, make_target())


class OnLogits(torch.nn.Module):
    """A term that is a module."""

    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, output, target):
        return self.loss(output.logits_b, target)


class Scaled:
    """A term that holds a module and is none."""

    def __init__(self, loss):
        self.loss = loss

    def __call__(self, output, target):
        return 2 * self.loss(output.logits_b, target)


HOLDERS = {
    'base term': lambda module: base_term('a', module),
    'partial': lambda module: Term('x_loss', functools.partial(lambda own, output, y: own(output[0], y), module)),
    'module': lambda module: Term('x_loss', OnLogits(module)),
    'around': lambda module: base_term('a', lambda logits, target: module(logits, target)),
    'closure': lambda module: Term('x_loss', lambda output, target: module(output.logits_a, target)),
    'attribute': lambda module: Term('x_loss', Scaled(module)),
    'method': lambda module: Term('x_loss', Scaled(module).__call__),
}


@pytest.mark.parametrize('how', HOLDERS)
def test_what_a_term_holds_follows_the_criterion(how):
    module = torch.nn.CrossEntropyLoss(weight=torch.ones(5)).eval()
    criterion = StagedLoss([HOLDERS[how](module)])
    assert how == 'module' or not criterion.state_dict()  # its keys are its own
    criterion.double()
    criterion.set_epoch(0)
    assert module.weight.dtype == torch.float64 and criterion(make_output(), make_target()).dtype == torch.float64
    criterion.to('meta')
    assert module.weight.device.type == 'meta'


def test_term_that_names_what_comes_later():
    criterion = StagedLoss([Term('x_loss', lambda output, target: later(output.logits_a, target))]).double()
    later = torch.nn.CrossEntropyLoss(weight=torch.ones(5)).double()
    criterion.set_epoch(0)
    assert criterion(make_output(), make_target()).isfinite()


@pytest.mark.parametrize('clone', [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=['copy', 'pickle'])
def test_copied_criterion_is_the_criterion(clone):
    module = torch.nn.CrossEntropyLoss(weight=torch.tensor([1., 2., 3., 4., 5.], dtype=torch.float64))
    criteria = [
        make_criterion(base_loss=module),
        StagedLoss([
            base_term('a', module), Term('kl_loss', kl_loss('both', 2.)), Term('hard_loss', token_loss('b')),
            Term('soft_loss', token_loss('b', 3.)), Term('cosub_loss', submodel_loss('a', True))]),
    ]
    output, target = make_output(ids=torch.arange(4)), make_target()
    output = output._replace(dist_logits_b=output.logits_a * 2)
    for criterion in criteria:
        criterion.set_epoch(0)
        other = clone(criterion)
        got, want = other.terms(output, target), criterion.terms(output, target)
        assert list(got) == list(want) and all(torch.equal(got[name], want[name]) for name in want)
        other.to('meta')
        assert module.weight.device.type == 'cpu'
        assert other.all_terms[0].function.args[0].weight.device.type == 'meta'
