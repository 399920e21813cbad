"""The terms by name: texts, directions, gates, parts of their own, and the built-in methods written in them."""
import copy
import math
import warnings
from functools import partial

import pytest
import torch
from processes import run_ranks
from small import TinyModel
from timm.task import FeatureDistillationTask
from torch import nn

from timm_vpl import PairOutput, PairTask, PairWrapper, StagedLoss
from timm_vpl.core import distillation, terms
from timm_vpl.core.method_options import DistillOptions, DMLOptions, PairOptions, VPLOptions
from timm_vpl.core.methods import METHODS, Setting
from timm_vpl.core.teacher import Teacher
from timm_vpl.core.term_options import check_terms, column_names, complete, parse_term
from timm_vpl.core.terms import ContrastiveLoss, FeatureLoss, LogitLoss, StageLogitLoss, Term, base_term

NUM_CLASSES = 5
CONFIG = {'input_size': (3, 16, 16), 'mean': (0.5,) * 3, 'std': (0.5,) * 3, 'interpolation': 'bicubic'}


# Texts; how they are spelled, and those that are refused: command_lines.yaml

def test_terms_that_can_be():
    asked = [parse_term(text) for text in (
        'kl,alpha=0.25,weight=2', 'kl,leader=teacher', 'kl,learner=a,leader=average', 'contrastive,learner=both', 'dkd',
        'ce,weight=3', 'tokens,features=stage1+stage2,leader_features=stage2+stage3')]
    check_terms(asked, ('a', 'b'), True)
    assert column_names(asked, ('a', 'b')) == [
        'kl_b_a_loss', 'kl_b_teacher_loss', 'kl_a_loss', 'contrastive_both_loss', 'dkd_b_loss', 'ce_b_loss',
        'tokens_b_loss']
    for order in (asked, asked[::-1]):  # the share of the labels' loss in any order
        found = {(name, own.learner, getattr(own, 'leader', '')): own.weight
                 for name, own in complete(order, ('a', 'b'))}
        assert list(found)[:2] == [('ce', 'a', ''), ('ce', 'b', '')]
        assert found['ce', 'a', ''] == 1 and found['ce', 'b', ''] == 3 * 0.75 and found['kl', 'b', 'a'] == 2 * 0.25
        assert found['contrastive', 'both', 'b'] == found['kl', 'b', 'teacher'] == 1
    [_, alone] = complete([parse_term('kl')], ('b',))
    assert alone.own.leader == 'a'  # in whose place the teacher stands


# Directions

def random_output(seed=0, num_images=4, width=6):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(num_images, *shape, generator=generator, dtype=torch.float64).requires_grad_()
    fields = {}
    for side in ('a', 'b', 'teacher'):
        embed = draw(width)
        fields.update({f'logits_{side}': draw(NUM_CLASSES), f'embed_{side}': embed,
                       f'features_{side}': {'embed': embed, 'stage1': draw(3, 4, 4), 'stage2': draw(3, 2, 2)}})
    return PairOutput(**fields)


def moved(output, loss):
    """Names of the tensors of a PairOutput that get a gradient."""
    leaves = {f'{field}.{key}': each for field, features in output._asdict().items()
              if isinstance(features, dict) for key, each in features.items()}
    leaves.update({field: each for field, each in output._asdict().items() if isinstance(each, torch.Tensor)})
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {name for name, grad in zip(leaves, grads, strict=True) if grad is not None and grad.any()}


TARGET = torch.tensor([0, 3, 1, 1])
SOFT = torch.rand(4, NUM_CLASSES, generator=torch.Generator().manual_seed(5)).softmax(dim=1)


@pytest.mark.parametrize('target', [TARGET, SOFT], ids=['hard', 'soft'])
@pytest.mark.parametrize('leader', ['a', 'b', 'teacher', 'average'])
@pytest.mark.parametrize('learner', ['a', 'b'])
def test_logit_loss(learner, leader, target):
    output = random_output()
    for temperature in (1., 4.):
        if leader == 'average':
            p = [(getattr(output, f'logits_{side}') / temperature).softmax(dim=1) for side in 'ab']
            reference = temperature * ((p[0] + p[1]) / 2).log()
        else:
            reference = getattr(output, f'logits_{leader}')
        logits, reference = getattr(output, f'logits_{learner}'), reference.detach()
        classes = target if target.ndim == 1 else target.argmax(dim=1)
        kl, dkd = (partial(each, temperature=temperature) for each in (distillation.kl_divergences, distillation.dkd))
        for got, want in (
                (LogitLoss(learner, leader, kl, temperature), kl(logits, reference)),
                (LogitLoss(learner, leader, kl, temperature, confidence=True),
                 kl(logits, reference) * distillation.confidence_weights(logits, reference)),
                (LogitLoss(learner, leader, dkd, temperature, uses_classes=True), dkd(logits, reference, classes))):
            if learner == leader:
                continue
            value = got(output, target)
            torch.testing.assert_close(value, want.mean())
            assert moved(output, value) == {f'logits_{learner}'}
            grads = [torch.autograd.grad(each, logits, retain_graph=True)[0] for each in (got(output, target),
                                                                                           want.mean())]
            torch.testing.assert_close(*grads)
    with pytest.raises(ValueError, match=f'logits_{learner} is None'):
        LogitLoss(learner, leader, distillation.dist)(output._replace(**{f'logits_{learner}': None}), target)
    if leader != 'average':
        with pytest.raises(ValueError, match=f'logits_{leader} is None'):
            LogitLoss(learner, leader, distillation.dist)(output._replace(**{f'logits_{leader}': None}), target)
        with pytest.raises(ValueError, match=r'logits have shapes \(4, 2\)'):
            wrong = output._replace(**{f'logits_{leader}': torch.ones(4, 2)})
            LogitLoss('ab'[leader == 'a'] if learner == leader else learner, leader, distillation.dist)(wrong, target)


def test_logit_loss_standardized_and_both():
    output = random_output()
    got = LogitLoss('b', 'average', distillation.kl_divergences, standardize=True)(output, TARGET)
    z = [distillation.standardized(logits) for logits in (output.logits_a, output.logits_b)]
    reference = torch.stack([each.softmax(dim=1) for each in z]).mean(dim=0).log().detach()
    torch.testing.assert_close(got, distillation.kl_divergences(z[1], reference).mean())
    for leader, learner in (('b', 'a'), ('a', 'b')):
        got = LogitLoss('both', leader, distillation.kl_divergences)(output, TARGET)
        want = distillation.kl_divergences(getattr(output, f'logits_{learner}'), getattr(output, f'logits_{leader}'))
        torch.testing.assert_close(got, want.mean())
        assert moved(output, got) == {'logits_a', 'logits_b'}


@pytest.mark.parametrize('learner, leader', [('a', 'b'), ('b', 'a'), ('a', 'teacher'), ('b', 'teacher')])
def test_feature_loss(learner, leader):
    output, names = random_output(), [('stage1', 'stage2'), ('stage2', 'stage1')]
    projections = [nn.Conv2d(3, 3, 1).double() for _ in names]
    loss = FeatureLoss(learner, leader, names, projections, partial(distillation.map_distances, norm='layer'))
    assert loss.features == {learner: ('stage1', 'stage2'), leader: ('stage2', 'stage1')}
    value = loss(output, TARGET)
    own, led = getattr(output, f'features_{learner}'), getattr(output, f'features_{leader}')
    want = sum(distillation.map_distances(projection(own[name]), led[other], 'layer').mean()
               for (name, other), projection in zip(names, projections, strict=True)) / 2
    torch.testing.assert_close(value, want)
    assert all(grad.any() for grad in torch.autograd.grad(value, list(loss.parameters()), retain_graph=True))
    assert moved(output, value) == {f'features_{learner}.stage1', f'features_{learner}.stage2'}
    for side in (learner, leader):
        for missing in (None, {}):
            with pytest.raises(ValueError, match=f"features_{side} has no 'stage[12]'"):
                loss(output._replace(**{f'features_{side}': missing}), TARGET)


@pytest.mark.parametrize('leader', ['a', 'teacher', 'average'])
def test_stage_logit_loss(leader):
    output = random_output()
    term = LogitLoss('b', leader, distillation.ofa, uses_classes=True)
    heads = [nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, NUM_CLASSES)).double() for _ in '12']
    loss = StageLogitLoss('b', ['stage1', 'stage2'], heads, term)
    value = loss(output, TARGET)
    reference = (output.logits_a.softmax(dim=1) + output.logits_b.softmax(dim=1)).log() - math.log(2) \
        if leader == 'average' else getattr(output, f'logits_{leader}')
    all_logits = [output.logits_b, *(head(output.features_b[name]) for name, head in zip(loss.features['b'], heads,
                                                                                          strict=True))]
    want = sum(distillation.ofa(logits, reference.detach(), TARGET).mean() for logits in all_logits)
    torch.testing.assert_close(value, want)
    assert moved(output, value) == {'logits_b', 'features_b.stage1', 'features_b.stage2'}
    with pytest.raises(ValueError, match="features_b has no 'stage1'"):
        loss(output._replace(features_b=None), TARGET)


@pytest.mark.parametrize('learner', ['a', 'b'])
def test_contrastive_with_a_teacher(learner):
    output = random_output()
    projection = nn.Linear(6, 6).double()
    loss = ContrastiveLoss(learner, leader='teacher', projection=projection)
    assert loss.features == {learner: ('embed',)} and not loss.uses_embeddings
    value = loss(output, TARGET)
    own = projection(getattr(output, f'embed_{learner}'))
    torch.testing.assert_close(value, terms.losses.contrastive(own, output.embed_teacher, 0.2))
    assert moved(output, value) == {f'embed_{learner}', f'features_{learner}.embed'}
    with pytest.raises(ValueError, match='embed_teacher is None'):
        loss(output._replace(embed_teacher=None), TARGET)
    with pytest.raises(ValueError, match=f"features_{learner} has no 'embed'"):
        loss(output._replace(**{f'features_{learner}': None}), TARGET)
    with pytest.raises(ValueError, match=r'\(4, 6\).*\(4, 2\)'):
        loss(output._replace(embed_teacher=torch.ones(4, 2)), TARGET)


def test_token_without_a_teacher():
    with pytest.raises(ValueError, match='logits_teacher is None'):
        terms.token_loss('b', leader='teacher')(PairOutput(None, torch.ones(1, 2), dist_logits_b=torch.ones(1, 2)), 0)


# In a task

class Learner(TinyModel):
    """With two features of its own name, in the manner of timm."""
    feature_info = [{'module': 'stem', 'reduction': 8}]

    def __init__(self, width, seed):
        torch.manual_seed(seed)
        super().__init__(NUM_CLASSES, width)
        self.pretrained_cfg, self.num_features, self.in_chans = CONFIG, width, 3

    def forward_features(self, x):
        return torch.tanh(self.stem(x))

    def forward_head(self, x, pre_logits=False):
        return x.mean((2, 3)) if pre_logits else self.head(x.mean((2, 3)))


WIDTHS = {'a': 6, 'b': 4, 'teacher': 5}


def make_task(texts, sides='ab', teacher=False, epochs=4, method='pair', own=None):
    models = {side: Learner(WIDTHS[side], i) for i, side in enumerate(WIDTHS)}
    own = own or PairOptions(terms=tuple(texts), teacher='x' if teacher else None)
    frozen = Teacher(models['teacher'], 'teacher' if len(sides) == 2 else 'ab'[sides == 'a'], CONFIG, CONFIG) \
        if teacher else None
    kind = METHODS[method]
    kind.check(own, tuple(sides))
    torch.manual_seed(7)
    pair = PairWrapper(
        *(models[side] if side in sides else None for side in 'ab'), affine=kind.projects(own, tuple(sides)),
        partner_dim=WIDTHS['teacher'] if len(sides) == 1 else None)
    setting = Setting(tuple(sides), epochs, num_classes=NUM_CLASSES, width=lambda side, name: WIDTHS[side])
    criterion = kind.criterion(own, setting)
    return PairTask(pair, criterion, teacher=frozen, verbose=False)


def batch(num_images=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_images, 3, 16, 16, generator=generator), torch.arange(num_images) % NUM_CLASSES


def losses_and_gradients(task, epochs=4, updates=3):
    """Loss and all gradients of some updates at each epoch, with SGD."""
    parameters = [*task.trainable_module.parameters(), *task.criterion.parameters()]
    optimizer, found = torch.optim.SGD(parameters, lr=0.1), []
    for epoch in range(epochs):
        task.set_epoch(epoch)
        for step in range(updates):
            optimizer.zero_grad()
            loss = task(*batch(seed=step))['loss']
            loss.backward()
            found += [loss.detach(), *(parameter.grad for parameter in parameters)]
            found = [None if each is None else each.clone() for each in found]
            optimizer.step()
    return found


@pytest.mark.parametrize('method, own, sides, teacher, texts', [
    ('vpl', VPLOptions(), 'ab', False, ['contrastive,learner=b,end=80', 'kl,learner=a,start=20']),
    ('vpl', VPLOptions(x=50, y=50, kl_weight=0.3, rho=2., tau=0.5, same_class='positive', similarity='dot'), 'ab',
     False, ['contrastive,tau=0.5,similarity=dot,same_class=positive,end=50',
             'kl,learner=a,start=50,weight=0.3,temperature=2,t_squared=false']),
    ('vpl', VPLOptions(contrastive_to='both', kl_to='both'), 'ab', False,
     ['contrastive,learner=both,end=80', 'kl,learner=both,start=20']),
    ('dml', DMLOptions(dml_joint=True), 'ab', False,
     ['kl,learner=both,weight=0.5', 'kl,learner=both,leader=a,weight=0.5']),
    ('distill', DistillOptions(teacher='x'), 'b', True, ['contrastive']),
    ('distill', DistillOptions(teacher='x'), 'a', True, ['kl,learner=a']),
    ('distill', DistillOptions(teacher='x', distill_terms='both', kl_weight=0.4), 'b', True,
     ['contrastive', 'kl,weight=0.4,leader=teacher']),
], ids=lambda value: value if isinstance(value, str) else '')
def test_built_in_methods_in_terms(method, own, sides, teacher, texts):
    want = make_task([], sides, teacher, method=method, own=own)
    if method == 'dml':  # the built-in row's order: ce_a, ce_b, kl_a, kl_b
        assert [term.name for term in want.criterion.all_terms] == ['ce_a_loss', 'ce_b_loss', 'kl_a_loss', 'kl_b_loss']
    got = losses_and_gradients(make_task(texts, sides, teacher))
    want = losses_and_gradients(want)
    for each, wanted in zip(got, want, strict=True):
        assert (each is None) == (wanted is None) and (each is None or torch.equal(each, wanted))


def test_embed_is_timms_feature_distillation():
    task = make_task(['embed,leader=teacher,weight=5'], teacher=True)
    timms = FeatureDistillationTask(
        copy.deepcopy(task.trainable_module.model_b), copy.deepcopy(task.teacher.branch.model),
        criterion=nn.CrossEntropyLoss(), distill_loss_weight=5., task_loss_weight=1., verbose=False)
    [projection] = task.criterion.parts['embed_b_loss'].projections
    timms.trainable_module.projection.load_state_dict(projection.state_dict())
    task.set_epoch(0)
    got, want = task(*batch()), timms(*batch())
    torch.testing.assert_close(got['embed_b_loss'], want['kd_loss'], rtol=0, atol=1e-6)
    torch.testing.assert_close(
        got['loss'] - got['ce_a_loss'], want['loss'], rtol=0, atol=1e-6)
    got['loss'].backward()
    want['loss'].backward()
    pairs = [*zip(task.trainable_module.model_b.parameters(), timms.trainable_module.student.parameters(), strict=True),
             *zip(projection.parameters(), timms.trainable_module.projection.parameters(), strict=True)]
    for each, wanted in pairs:
        torch.testing.assert_close(each.grad, wanted.grad, rtol=0, atol=1e-6)
    assert all(parameter.grad is None for parameter in task.teacher.parameters())


GATED = ['kl,learner=a,when=leader-ahead', 'embed,leader=a,when=leader-ahead', 'dkd,leader=teacher']


def test_gates():
    task = make_task(GATED, teacher=True)
    criterion = task.criterion
    always, gated = ['ce_a_loss', 'ce_b_loss', 'dkd_b_loss'], {'a': 'kl_a_loss', 'b': 'embed_b_loss'}
    assert criterion.gates == {'a', 'b'} and criterion.accuracies == {}

    def on(accuracies):
        criterion.accuracies = accuracies
        return [term.name for term in criterion.active_terms()]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        task.set_epoch(0)
        with pytest.raises(UserWarning, match='no accuracies were set'):
            task.set_epoch(1)
    assert on({}) == on({'a': 50., 'b': 50.}) == on({'a': math.nan, 'b': 1.}) == always
    assert set(on({'a': 50., 'b': 50.1})) == {*always, gated['a']}
    assert set(on({'a': 50.1, 'b': 50.})) == {*always, gated['b']}
    assert criterion.features == {'b': ('embed',), 'a': ('embed',)}
    state, other = copy.deepcopy(task.get_task_state()), make_task(GATED, teacher=True)
    other.load_task_state(state)
    assert other.criterion.accuracies == {'a': 50.1, 'b': 50.}
    assert [term.name for term in other.criterion.active_terms()] == on({'a': 50.1, 'b': 50.})
    assert 'accuracies' not in make_task(['kl']).get_task_state()


PARTS = ['tokens,features=stem,leader=teacher,norm=layer', 'embed,learner=a,leader=b', 'contrastive,leader=teacher']


def test_parts():
    task, other = make_task(PARTS, teacher=True), make_task(PARTS, teacher=True)
    parts = task.criterion.parts
    assert list(parts) == ['tokens_b_loss', 'embed_a_loss', 'contrastive_b_loss']
    groups = task.clip_groups()
    for name, side in (('tokens_b_loss', 'b'), ('embed_a_loss', 'a'), ('contrastive_b_loss', 'b')):
        for which, group in groups.items():
            held = {id(parameter) for parameter in group}
            assert all((id(parameter) in held) == (which == side) for parameter in parts[name].parameters())
    before = copy.deepcopy(task.criterion.state_dict())
    task.settle(batch()[0])
    assert all(p.grad is None for p in [*task.trainable_module.parameters(), *task.criterion.parameters()])
    losses_and_gradients(task, epochs=1)
    after = task.get_task_state()['criterion']
    assert list(before) == list(after) and not any(torch.equal(before[key], after[key]) for key in before)
    other.load_task_state(copy.deepcopy(task.get_task_state()))
    for key, value in other.criterion.state_dict().items():
        assert torch.equal(value, after[key])
    other.trainable_module.load_state_dict(task.trainable_module.state_dict())
    for got, want in zip(losses_and_gradients(other, 1), losses_and_gradients(task, 1), strict=True):
        assert torch.equal(got, want)
    assert 'criterion' not in make_task(['kl']).get_task_state()


class Idle(nn.Module):
    """A term that projects embeddings as the criterion gives them, with a layer that it may not use."""
    uses_embeddings = True

    def __init__(self, idle):
        super().__init__()
        self.used, self.idle = nn.Linear(6, 6), nn.Linear(1, 1) if idle else None

    def forward(self, output, target):
        return (self.used(output.embed_b) - output.embed_a.detach()).square().mean()


def test_settle_of_a_users_term():
    def task(idle):
        pair = PairWrapper(Learner(6, 0), Learner(4, 1))  # with an affine layer from 4 to 6
        criterion = StagedLoss([base_term('a'), base_term('b'), Term('own_loss', Idle(idle))])
        return PairTask(pair, criterion, verbose=False)
    task(False).settle(batch()[0])
    with pytest.raises(ValueError, match='own_loss: idle.weight gets no gradient'):
        task(True).settle(batch()[0])


def test_parameters_that_nothing_trains():
    layer = nn.Linear(2, 2)

    def closure(output, target):
        return layer(target)

    def listed(output, target):
        return layers[0](target)
    layers = [layer]
    in_module = FeatureLoss('b', 'a', [('embed', 'embed')], None, lambda x, y: layer(x - y))
    for function in (closure, listed, partial(torch.add, layer), LogitLoss('b', 'a', lambda z, r: layer(z - r)),
                     in_module):
        layer.requires_grad_(True)
        with pytest.raises(ValueError, match='x_loss: its function holds a Linear with parameters that nothing trains'):
            StagedLoss([Term('x_loss', function)])
        layer.requires_grad_(False)
        StagedLoss([Term('x_loss', function)])
    StagedLoss([Term('x_loss', FeatureLoss('b', 'a', [('embed', 'embed')], [nn.Linear(2, 2)], torch.sub))])


# In two processes

WORLD, ROWS = 2, 4


def gradients(task, rows):
    """Gradients of two steps, the second after an update; of all that is trained."""
    x, target = batch(WORLD * ROWS)
    parameters = dict([*task.trainable_module.named_parameters(), *task.criterion.named_parameters()])
    optimizer, found = torch.optim.SGD(parameters.values(), lr=0.1), []
    task.settle(x[rows])
    task.set_epoch(0)
    for _ in range(2):
        optimizer.zero_grad()
        task(x[rows], target[rows])['loss'].backward()
        found.append({name: parameter.grad.clone() for name, parameter in parameters.items()})
        optimizer.step()
    return found


def scenario(rank, world):
    task = make_task(PARTS, teacher=True)
    return gradients(task.prepare_distributed(), slice(rank * ROWS, (rank + 1) * ROWS))


def test_two_processes(tmp_path):
    want = gradients(make_task(PARTS, teacher=True), slice(None))
    for found in run_ranks(tmp_path, WORLD, scenario):
        for step, wanted in zip(found, want, strict=True):
            assert list(step) == list(wanted)
            for name, gradient in wanted.items():
                torch.testing.assert_close(step[name], gradient, rtol=1e-4, atol=1e-7)
