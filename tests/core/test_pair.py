"""PairWrapper against the bare timm models: outputs, embeddings, affine layer, state, timm's tools, compilation."""
import copy
import pickle

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from small import (
    DEIT,
    NUM_CLASSES,
    TinyModel,
    assert_equal_outputs,
    assert_equal_states,
    images,
    make_model,
    make_pair,
    one_branch,
    seeded,
)
from timm.optim import create_optimizer_v2
from torch._dynamo.utils import counters

from timm_vpl import PairOutput, PairWrapper
from timm_vpl.core.names import SIDES, partner_of
from timm_vpl.engine.optim import param_groups
from timm_vpl.options.train import make_options

STOCHASTIC = {'drop_rate': 0.3, 'drop_path_rate': 0.3}


def first_classifier(model):
    classifier = model.get_classifier()
    return classifier[0] if isinstance(classifier, tuple) else classifier


def embedding(pair, side, x):
    return pair.run(side, x)[1]


def square_sum(output):
    return sum(field.square().sum() for field in output[:4])


def moved(module):
    """Names of the parameters that have a gradient other than zero."""
    return {name for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}


def nothing_held(pair):
    return all(pair.parts[side]._tap.kept == [] and not pair.parts[side]._tap.on for side in pair.sides)


# outputs; that a branch gives the bare model's logits and its classifier's input, for all of timm: test_registry.py

def test_output_begins_with_logits_and_embeddings():
    assert PairOutput._fields[:4] == ('logits_a', 'logits_b', 'embed_a', 'embed_b')
    assert PairOutput._field_defaults == dict.fromkeys(PairOutput._fields[2:])
    output = make_pair()(images())
    assert isinstance(output, PairOutput)
    assert [tuple(field.shape) for field in output[:4]] == [(4, NUM_CLASSES), (4, NUM_CLASSES), (4, 96), (4, 96)]
    assert output.dist_logits_a is None and output.dist_logits_b is None and output.sample_ids is None


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit', 'test_efficientnet'])
@pytest.mark.parametrize('side', SIDES)
def test_branch_alone_is_the_bare_model(side, name):
    bare = make_model(name, **STOCHASTIC)
    pair, other = one_branch(side, copy.deepcopy(bare)), partner_of(side)
    output, want = seeded(1, pair, images()), seeded(1, bare, images())
    logits, embed = getattr(output, f'logits_{side}'), getattr(output, f'embed_{side}')
    assert torch.equal(logits, want)
    assert not torch.equal(seeded(2, bare, images()), want)  # guards the comparison: it is random
    assert torch.equal(first_classifier(pair.branch(side))(embed), logits)
    assert getattr(output, f'logits_{other}') is None and getattr(output, f'embed_{other}') is None
    for result in (logits, want):
        result.square().sum().backward()
    assert all(torch.equal(*(each.grad for each in both)) for both in zip(
        pair.parameters(), bare.parameters(), strict=True))
    assert pair.sides == (side,) == copy.deepcopy(pair).sides and pair.affine is None
    assert set(pair.state_dict()) == {f'model_{side}.{key}' for key in bare.state_dict()}
    assert pair.num_classes == NUM_CLASSES and pair.get_classifier() == (pair.branch(side).get_classifier(),)


def test_two_headed_branch_gives_class_token_and_second_logits():
    model = make_model(DEIT)
    pair = PairWrapper(make_model('test_resnet'), model)
    assert pair.parts['b'].classifier is model.head and pair.affine.in_features == 48

    tokens = model.eval().forward_features(images())
    pair.eval()
    output = pair(images())
    assert torch.equal(embedding(pair, 'b', images()), tokens[:, 0])
    assert torch.equal(output.embed_b, pair.affine(torch.cat([tokens[:, 0]] * 2))[:4])
    assert torch.equal(output.logits_b, (model.head(tokens[:, 0]) + model.head_dist(tokens[:, 1])) / 2)
    assert output.dist_logits_b is None

    model.set_distilled_training(True)
    assert pair(images()).dist_logits_b is None  # in training only
    output = pair.train()(images())
    assert torch.equal(output.logits_b, model.head(tokens[:, 0]))
    assert torch.equal(output.dist_logits_b, model.head_dist(tokens[:, 1]))
    assert output.dist_logits_a is None
    assert pair.get_classifier() == (pair.model_a.fc, (model.head, model.head_dist))


@pytest.mark.parametrize('affine_side', SIDES)
def test_each_part_runs_once(affine_side):
    pair = make_pair(affine_side=affine_side)
    calls = []
    for name, module in (('a', pair.model_a.conv1[0]), ('b', pair.model_b.patch_embed.proj), ('P', pair.affine)):
        module.register_forward_hook(lambda module, args, output, name=name: calls.append(name))
    for mode in (True, False):
        pair.train(mode)(images())
        assert calls == ['a', 'b', 'P']
        calls.clear()
    pair(images(), project=False)
    assert calls == ['a', 'b']


# the affine layer

@pytest.mark.parametrize(('kwargs', 'side', 'widths'), [({}, 'b', (64, 96)), ({'affine_side': 'a'}, 'a', (96, 64))])
def test_affine_layer_is_on_side_b_by_default(kwargs, side, widths):
    pair, other = make_pair(**kwargs), partner_of(side)
    assert pair.affine_side == side and (pair.affine.in_features, pair.affine.out_features) == widths
    assert f'affine_side={side!r}' in repr(pair)
    output = pair(images())
    assert torch.equal(getattr(output, f'embed_{other}'), embedding(pair, other, images()))
    h, embed = embedding(pair, side, images()), getattr(output, f'embed_{side}')
    torch.testing.assert_close(embed, F.linear(h, pair.affine.weight, pair.affine.bias))
    assert getattr(output, f'stopped_{other}') is None and torch.equal(getattr(output, f'stopped_{side}'), embed)
    # Without projection that side's embedding is None.
    full, output = pair.eval()(images()), pair(images(), project=False)
    assert getattr(output, f'embed_{side}') is None and output.stopped_a is None and output.stopped_b is None
    for field in ('logits_a', 'logits_b', f'embed_{other}'):
        assert torch.equal(getattr(output, field), getattr(full, field))
    sum(output[:2]).sum().backward()
    assert pair.affine.weight.grad is None and pair.affine.bias.grad is None


def test_no_affine_layer_for_equal_widths():
    pair = make_pair('test_convnext')
    assert pair.affine is None and set(pair.parts) == {'a', 'b'} and 'affine_side' not in repr(pair)
    for project in (True, False):  # what 'project' leaves out is the affine side's: here nothing
        output = pair(images(), project=project)
        assert torch.equal(output.embed_a, embedding(pair, 'a', images()))
        assert torch.equal(output.embed_b, embedding(pair, 'b', images()))
        assert output.stopped_a is None and output.stopped_b is None


@pytest.mark.parametrize('side', SIDES)
def test_stopped_embedding_moves_the_affine_layer_only(side):
    pair = make_pair(affine_side=side)
    gradients = []
    for field, branch_learns in ((f'stopped_{side}', False), (f'embed_{side}', True)):
        pair.zero_grad()
        getattr(pair(images()), field).square().sum().backward()
        gradients.append(pair.affine.weight.grad)
        assert {name.split('.')[0] for name in moved(pair)} == {'affine', *([f'model_{side}'] if branch_learns else [])}
    torch.testing.assert_close(*gradients)


# state, copies, the bare models

@pytest.mark.parametrize(('name_a', 'affine'), [('test_resnet', True), ('test_convnext', False)])
def test_state_dict_holds_each_part_once(name_a, affine):
    pair = make_pair(name_a)
    want = [f'model_{side}.{key}' for side in SIDES for key in pair.branch(side).state_dict()]
    want += ['affine.weight', 'affine.bias'] if affine else []
    assert list(pair.state_dict()) == want
    parameters = [name for name, _ in pair.named_parameters()]
    assert parameters == [key for key in want if key in set(parameters)]
    assert {name.split('.')[0] for name, _ in pair.named_modules() if name} == {
        'model_a', 'model_b', 'inputs', *(['affine'] if affine else [])}

    other = make_pair(name_a, seed=8).eval()
    other.load_state_dict(pair.state_dict(), strict=True)
    assert_equal_outputs(other(images()), pair.eval()(images()))
    assert list(pair.state_dict()) == want
    # A conversion of the pair reaches what the parts call.
    output = pair.double()(images(dtype=torch.float64))
    assert all(field.dtype == torch.float64 for field in output[:4])


@pytest.mark.parametrize('clone', [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=['copy', 'pickle'])
def test_copy_is_independent(clone):
    pair = make_pair(drop_rate=0.2).train()
    before = copy.deepcopy(pair.state_dict())
    other = clone(pair)
    for side in SIDES:
        assert other.parts[side].model is other.branch(side) is getattr(other, f'model_{side}')
        assert other.parts[side].classifier is first_classifier(other.branch(side))
    assert_equal_outputs(seeded(1, other.eval(), images()), seeded(1, pair.eval(), images()))
    assert_equal_states(pair.state_dict(), before)

    optimizer = torch.optim.SGD(other.train().parameters(), lr=0.1)
    for _ in range(2):
        square_sum(other(images())).backward()
        optimizer.step()
    assert_equal_states(pair.state_dict(), before)
    assert not moved(pair) and not torch.equal(other.model_a.fc.weight, pair.model_a.fc.weight)

    # Each one's hook fills its own stash: the embedding is that of its own weights, in its own graph.
    for module in (pair, other):
        output = module.eval()(images())
        assert torch.equal(module.model_a.fc(output.embed_a), output.logits_a) and nothing_held(module)
        module.zero_grad()
        output.embed_a.sum().backward()
        assert module.model_a.conv1[0].weight.grad is not None


class Adapted(nn.Module):
    """A model around another that learns a little beside it, as peft's are."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(()))

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base, name)

    def forward(self, x):
        return self.base(self.scale * x)


def another(model):
    return make_model('test_resnet' if hasattr(model, 'fc') else 'test_vit', seed=9)


def compiled(model):
    return torch.compile(model, backend='eager')


@pytest.mark.parametrize('make, side', [
    (another, 'a'), (another, 'b'), (Adapted, 'a'), (Adapted, 'b'), (compiled, 'b')])
def test_model_that_is_assigned_is_the_one_that_runs(make, side, dynamo):
    pair = make_pair().eval()
    pair.parts[side].memory_format = torch.channels_last
    other = make(pair.branch(side)).eval()
    want = other(images())
    setattr(pair, f'model_{side}', other)
    for module in (pair, copy.deepcopy(pair)):
        logits = getattr(module(images()), f'logits_{side}')
        torch.testing.assert_close(logits, want)
        head = first_classifier(module.branch(side))
        embed = embedding(module, side, images())
        torch.testing.assert_close(F.linear(embed, head.weight, head.bias), logits)
        assert module.parts[side].model is module.branch(side) is getattr(module, f'model_{side}')
        assert module.parts[side].memory_format is torch.channels_last and nothing_held(module)
    assert pair.branch(side) is other
    pair(images())[SIDES.index(side)].sum().backward()
    learnt = [parameter for parameter in other.parameters() if parameter.requires_grad]
    assert learnt and all(parameter.grad is not None for parameter in learnt)


@pytest.mark.parametrize('make, message', [
    (lambda: make_model('test_resnet', num_classes=7), 'width 96 and 7 classes.* 96 and 5: '),
    (lambda: make_model('test_convnext'), 'width 64 and 5 classes.* 96 and 5: '),
    (lambda: nn.Linear(2, 2), 'no get_classifier'),
    (lambda: None, 'no get_classifier'),
], ids=['classes', 'width', 'no classifier', 'none'])
def test_model_that_does_not_fit_is_not_assigned(make, message):
    pair = make_pair().eval()
    want, model_a = pair(images()), pair.model_a
    with pytest.raises(ValueError, match=f'model_a.*{message}'):
        pair.model_a = make()
    assert pair.model_a is model_a
    with pytest.raises(ValueError, match='model_b.*without'):
        PairWrapper(model_a, None).model_b = make_model('test_vit')
    assert_equal_outputs(pair(images()), want)


def test_affine_layer_that_is_assigned_is_the_one_that_runs():
    pair = make_pair().eval()
    pair.affine = other = nn.Linear(64, 96)
    for module in (pair, copy.deepcopy(pair)):
        torch.testing.assert_close(module(images()).embed_b, other(embedding(module, 'b', images())))
    assert pair.parts['affine'] is other
    pair.affine = None
    assert set(pair.parts) == {'a', 'b'} and pair(images()).embed_b.shape == (4, 64)


def test_bare_model_stays_usable_and_holds_nothing():
    pair = make_pair().eval()
    want, embed = copy.deepcopy(pair.model_a)(images(seed=1)), pair(images()).embed_a
    with pytest.raises(RuntimeError):  # a forward that fails leaves nothing behind
        pair.run('a', torch.randn(2, 4, 32, 32))  # four channels
    assert torch.equal(pair.model_a(images(seed=1)), want)
    assert torch.equal(copy.deepcopy(pair.model_a)(images(seed=1)), want)
    assert nothing_held(pair)
    assert torch.equal(pair(images()).embed_a, embed)


# errors

class FourDimensional(TinyModel):
    """Its classifier is a convolution over the feature map, pooled after it."""

    def __init__(self):
        super().__init__(classifier=nn.Conv2d(6, NUM_CLASSES, 1))

    def forward(self, x):
        return self.head(torch.tanh(self.stem(x))).mean((2, 3))


@pytest.mark.parametrize(('model_a', 'model_b', 'kwargs', 'message'), [
    ('test_resnet', lambda: make_model('test_vit', num_classes=7), {}, r'classify 5 \(a\) and 7 \(b\) classes'),
    (lambda: make_model('test_convnext', num_classes=0), 'test_vit', {},
     r'model_a \(ConvNeXt\): has no classifier \(num_classes=0\?\)'),
    ('test_vit', lambda: make_model('test_convnext', num_classes=0), {}, r'model_b \(ConvNeXt\): has no classifier'),
    ('test_resnet', lambda: nn.Linear(3, NUM_CLASSES), {}, r'model_b \(Linear\): has no get_classifier\(\)'),
    (lambda: TinyModel(classifier=nn.Bilinear(6, 6, NUM_CLASSES)), 'test_vit', {},
     r'model_a \(TinyModel\): the width of its embedding is not known'),
    (lambda: None, lambda: None, {}, 'model_a and model_b are both None'),
    *(('test_resnet', 'test_vit', {'affine_side': side}, f'affine_side is {side!r}') for side in ('c', None, 'both')),
], ids=lambda value: value if isinstance(value, str) else '')
def test_models_that_are_no_pair_are_refused(model_a, model_b, kwargs, message):
    models = [make_model(model) if isinstance(model, str) else model() for model in (model_a, model_b)]
    with pytest.raises(ValueError, match=message):
        PairWrapper(*models, **kwargs)


def test_classifier_that_gives_no_embedding_is_refused():
    pair = PairWrapper(FourDimensional(), make_model('test_vit'))
    with pytest.raises(ValueError, match=r'model_a \(FourDimensional\): .* input of shape \(4, 6, 4, 4\)'):
        pair(images())
    pair = make_pair()
    pair.model_a.reset_classifier(3)  # past the pair, which hooks the old one
    with pytest.raises(ValueError, match=r'model_a \(ResNet\): 0 of its 1 last layer\(s\) ran'):
        pair(images())


# what timm's tools ask of a model

def test_attributes_of_a_model():
    pair = make_pair('test_resnet', DEIT)
    assert pair.num_classes == NUM_CLASSES
    assert pair.pretrained_cfg is pair.model_a.pretrained_cfg and pair.default_cfg is pair.pretrained_cfg
    assert timm.data.resolve_model_data_config(pair) == timm.data.resolve_model_data_config(pair.model_a)
    assert pair.no_weight_decay() == {f'model_b.{name}' for name in pair.model_b.no_weight_decay()}
    assert {'model_b.pos_embed', 'model_b.dist_token'} <= pair.no_weight_decay()
    pair = PairWrapper(TinyModel(), TinyModel(width=9))  # not timm's
    output = pair(images())
    assert output.embed_a.shape == output.embed_b.shape == (4, 6)
    assert pair.no_weight_decay() == set() and pair.num_classes == NUM_CLASSES and pair.pretrained_cfg == {}


@pytest.mark.parametrize('side', SIDES)
def test_channels_last_of_one_branch(side):
    pair = make_pair('test_resnet', 'test_convnext').eval()
    want = pair(images())
    pair.branch(side).to(memory_format=torch.channels_last)
    pair.parts[side].memory_format = torch.channels_last
    seen = {}
    for name, stem in (('a', pair.model_a.conv1[0]), ('b', pair.model_b.stem[0])):
        stem.register_forward_pre_hook(lambda module, args, name=name: seen.update({name: args[0]}))
    for module in (pair, copy.deepcopy(pair)):
        got = module(images())
        for name in SIDES:
            format = torch.channels_last if name == side else torch.contiguous_format
            assert seen[name].is_contiguous(memory_format=format), name
        torch.testing.assert_close(got[:4], want[:4], rtol=1e-4, atol=1e-4)


def test_grad_checkpointing_changes_nothing():
    pair = make_pair(**STOCHASTIC).train()
    other = copy.deepcopy(pair)
    other.set_grad_checkpointing()
    assert [other.branch(side).grad_checkpointing for side in SIDES] == [True, True]
    outputs = [seeded(4, module, images()) for module in (pair, other)]
    assert_equal_outputs(*outputs)
    for output in outputs:
        square_sum(output).backward()
    assert all(torch.equal(one.grad, two.grad) for one, two in zip(pair.parameters(), other.parameters(), strict=True))
    other.set_grad_checkpointing(False)
    assert [other.branch(side).grad_checkpointing for side in SIDES] == [False, False]


def test_reset_classifier_hooks_the_new_one():
    pair = make_pair()
    old = pair.model_a.fc
    pair.reset_classifier(7)
    assert pair.num_classes == pair.model_b.num_classes == 7
    assert pair.model_a.fc is not old and pair.parts['a'].classifier is pair.model_a.fc
    for side, classifier in (('a', pair.model_a.fc), ('b', pair.model_b.head)):
        logits, embed, *_ = pair.run(side, images())
        assert logits.shape == (4, 7) and torch.equal(classifier(embed), logits)
        assert len(classifier._forward_pre_hooks) == 1
    assert nothing_held(pair)


def group_settings(optimizer):
    """What each parameter gets: {id: (lr_scale, weight decay)}."""
    return {id(parameter): (group.get('lr_scale', 1.), group['weight_decay'])
            for group in optimizer.param_groups for parameter in group['params']}


PAIRS = {
    'test_resnet + test_vit': lambda: make_pair(),
    'test_vit + test_resnet': lambda: make_pair('test_vit', 'test_resnet', affine_side='a'),
    'test_convnext + test_vit': lambda: make_pair('test_convnext', 'test_vit'),
    'test_byobnet + deit': lambda: make_pair('test_byobnet', DEIT),
    'not timm\'s + test_vit': lambda: PairWrapper(TinyModel(), make_model('test_vit')),
}
@pytest.mark.parametrize('kwargs', [
    {}, {'layer_decay': 0.75}, {'layer_decay': 0.75, 'layer_decay_min_scale': 0.3},
    {'layer_decay': 0.5, 'filter_bias_and_bn': False}], ids=str)
@pytest.mark.parametrize('make', PAIRS.values(), ids=PAIRS)
def test_parameters_get_what_they_get_alone(make, kwargs):
    pair = make()
    kwargs = {'lr': 1, 'weight_decay': 0.05, **kwargs}
    got = group_settings(create_optimizer_v2(pair, 'adamw', **kwargs))
    want = {}
    for side in SIDES:
        want.update(group_settings(create_optimizer_v2(pair.branch(side), 'adamw', **kwargs)))
    if pair.affine is not None:
        want[id(pair.affine.weight)] = (1., 0.05)
        want[id(pair.affine.bias)] = (1., 0. if kwargs.get('filter_bias_and_bn', True) else 0.05)
    names = {id(parameter): name for name, parameter in pair.named_parameters()}
    assert {names[key]: value for key, value in got.items()} == {names[key]: value for key, value in want.items()}
    assert len(got) == len(names)
    # Guards the comparison.
    scales = {scale for scale, _ in got.values()}
    assert len(scales) > 2 if 'layer_decay' in kwargs else scales == {1.}
    assert min(scales) >= kwargs.get('layer_decay_min_scale', 0.)


@pytest.mark.parametrize('frozen', [0, 2])
@pytest.mark.parametrize('layer_decays', [(None, None), (0.75, 0.75), (0.8, 0.6)])
def test_named_groups_of_the_script_are_each_branchs_own(layer_decays, frozen):
    pair, decays = make_pair(), {'a': 0.1, 'b': 0.05}
    values = {'model': 'x', 'weight_decay': decays, 'layer_decay': dict(zip(SIDES, layer_decays, strict=True)),
              'layer_decay_min_scale': {'a': None, 'b': 0.7}}
    options = make_options({
        f'{name}_{side}': value[side] if isinstance(value, dict) else value
        for name, value in values.items() for side in SIDES})
    want = {id(pair.affine.weight): (1., 0.05), id(pair.affine.bias): (1., 0.)}
    for side, layer_decay in zip(SIDES, layer_decays, strict=True):
        want.update(group_settings(create_optimizer_v2(
            pair.branch(side), 'adamw', lr=1, weight_decay=decays[side], layer_decay=layer_decay,
            layer_decay_min_scale=values['layer_decay_min_scale'][side] or 0.)))
        pair.freeze(side, frozen)
    trained = {id(parameter) for parameter in pair.parameters() if parameter.requires_grad}
    assert (len(trained) < len(want)) == (frozen > 0)
    groups = param_groups(options, pair, {'a': 0.5, 'b': 0.25})
    assert {(group['side'], group['lr']) for group in groups} == {('a', 0.5), ('b', 0.25)}
    assert group_settings(create_optimizer_v2(groups, 'adamw', lr=1)) == {
        key: value for key, value in want.items() if key in trained}


# compilation

class Graphs:
    """A backend that runs the captured graph as it is and counts the graphs."""

    def __init__(self):
        self.count = self.varying = 0

    def __call__(self, graph, example_inputs):
        self.count += 1
        self.varying += any(isinstance(value, torch.SymInt) for value in example_inputs)
        return graph.forward


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    counters.clear()
    # torch's own limit: importing timm.optim (its kron.py) lifts it for the whole process.
    with torch._dynamo.config.patch(cache_size_limit=8, fail_on_cache_limit_hit=True):
        yield
    torch._dynamo.reset()


def quick_model(width=6, drop_rate=0.):
    """A model that compiles quickly and is another graph in eval mode."""
    model = TinyModel(width=width)
    model.stem = nn.Sequential(model.stem, nn.BatchNorm2d(width), nn.Dropout(drop_rate))
    return model


def quick_pair():
    return PairWrapper(quick_model(), quick_model(width=7)).eval()


def compile_branches(pair):
    graphs = {side: Graphs() for side in pair.sides}
    for side in pair.sides:
        pair.parts[side].compile(backend=graphs[side])
    return graphs


def counts(graphs):
    return [graphs[side].count for side in SIDES]


@pytest.mark.parametrize(('names', 'backend'), [
    (('test_resnet', 'test_vit'), ''),
    pytest.param(('test_efficientnet', DEIT), '', marks=pytest.mark.slow),
    pytest.param(('test_resnet', 'test_vit'), 'aot_eager', marks=pytest.mark.slow),
], ids=str)
def test_compiled_branch_is_one_graph_with_the_same_outputs(names, backend, dynamo):
    pair = make_pair(*names, drop_rate=0.2, drop_path_rate=0.2)
    eager = copy.deepcopy(pair)
    graphs = None if backend else compile_branches(pair)
    if backend:
        pair.compile(backend=backend)
    for side in SIDES:
        got, want = (seeded(6, module.train().run, side, images()) for module in (pair, eager))
        torch.testing.assert_close(got[:2], want[:2], **({} if backend else {'rtol': 0, 'atol': 0}))
        for output in (got, want):
            (output[0].square().mean() + output[1].square().mean()).backward()
        for one, two in zip(pair.branch(side).parameters(), eager.branch(side).parameters(), strict=True):
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-4)
    assert not counters['graph_break'] and nothing_held(pair)
    assert backend or counts(graphs) == [1, 1]
    assert list(pair.state_dict()) == list(eager.state_dict())
    # The bare model is as it was.
    assert torch.equal(pair.eval().model_a(images()), eager.eval().model_a(images())) and nothing_held(pair)


def test_copy_of_a_compiled_pair_starts_uncompiled(dynamo):
    pair, fresh = quick_pair(), quick_pair()
    want, graphs = pair(images()), compile_branches(pair)
    assert_equal_outputs(pair(images()), want)
    before, other = counts(graphs), copy.deepcopy(pair)
    assert all(other.parts[side]._compiled_call_impl is None for side in SIDES)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    fresh.load_state_dict(other.state_dict())
    assert_equal_outputs(other(images()), fresh(images()))
    own = compile_branches(other)
    assert_equal_outputs(other(images()), fresh(images()))
    assert_equal_outputs(pair(images()), want)  # the original still gives its own
    assert counts(own) == [1, 1] and counts(graphs) == before


def test_uses_of_a_run_stay_below_dynamos_limit(dynamo):
    # Training, its last batch, validation, its last batch, a forward with gradient in eval mode. Past Dynamo's limit
    # (8 entries a code object) the fixture's setting raises.
    model_b = make_model('test_vit', depth=1, embed_dim=16, drop_rate=0.1, drop_path_rate=0.1)
    pair = PairWrapper(quick_model(drop_rate=0.1), model_b)
    graphs = compile_branches(pair)
    for num_images in (8, 5, 2):
        pair.train()(images(num_images))
    with torch.no_grad():
        for num_images in (8, 6, 3):
            pair.eval()(images(num_images))
    pair.eval()(images(7))
    torch.testing.assert_close(pair(images(3))[:4], copy.deepcopy(pair)(images(3))[:4])
    seen = counts(graphs)
    assert 1 < max(seen) < torch._dynamo.config.cache_size_limit and not counters['graph_break']
    for num_images in (8, 5, 2):  # nothing new for what was seen
        pair.train()(images(num_images))
    assert counts(graphs) == seen


def test_each_branch_has_a_limit_of_its_own(dynamo):
    # And what is learnt of sizes is its own: with one for both, images of another size would be compiled for any size.
    with torch._dynamo.config.patch(cache_size_limit=2):
        for _ in range(2):
            pair = quick_pair()
            graphs = compile_branches(pair)
            x = {'a': images(), 'b': torch.randn(4, 3, 48, 48)}
            for mode in (True, False):
                output = pair.train(mode)(x)
                assert torch.equal(output.logits_a, pair.model_a(x['a']))
                assert torch.equal(output.logits_b, pair.model_b(x['b']))
            assert counts(graphs) == [2, 2] and not any(graphs[side].varying for side in SIDES)
