"""Feature maps by name, of timm's small families, against timm's own, and under all that a branch runs in."""
import copy

import pytest
import timm
import torch
from small import TinyModel
from torch import nn

from timm_vpl import PairWrapper
from timm_vpl.core.features import as_map, find_module, stages_of
from timm_vpl.core.pair import Branch

NUM_CLASSES = 4
SMALL_VIT = {'img_size': 32, 'patch_size': 8, 'embed_dim': 24, 'depth': 5, 'num_heads': 3}
SMALL_SWIN = {'img_size': 64, 'window_size': 2, 'embed_dim': 12, 'depths': (1, 2, 1, 1), 'num_heads': (1, 2, 3, 4)}
SMALL_CONVNEXT = {'depths': (1, 2, 1, 1), 'dims': (8, 16, 24, 32)}
SMALL_PIT = {'img_size': 64, 'base_dims': (8, 8, 8), 'depth': (1, 2, 1), 'heads': (1, 2, 4)}
# (model, its arguments, height and width of the image, shapes of its stages)
CASES = [
    ('test_vit', {'img_size': 32}, (32, 32), 4 * [(64, 2, 2)]),
    ('vit_tiny_patch16_224', {**SMALL_VIT, 'img_size': (16, 32)}, (16, 32), 4 * [(24, 2, 4)]),
    ('deit_tiny_distilled_patch16_224', SMALL_VIT, (32, 32), 4 * [(24, 4, 4)]),
    ('beit_base_patch16_224', {**SMALL_VIT, 'depth': 4}, (32, 32), 4 * [(24, 4, 4)]),
    ('test_resnet', {}, (64, 32), [(32, 16, 8), (48, 8, 4), (192, 4, 2), (96, 2, 1)]),
    ('test_efficientnet', {}, (64, 64), [(24, 16, 16), (32, 8, 8), (48, 4, 4), (64, 2, 2)]),
    ('test_convnext', {}, (64, 64), [(24, 16, 16), (32, 8, 8), (48, 4, 4), (64, 2, 2)]),
    ('convnext_atto', SMALL_CONVNEXT, (36, 50), [(8, 9, 12), (16, 4, 6), (24, 2, 3), (32, 1, 1)]),
    ('test_mambaout', {}, (64, 64), [(16, 16, 16), (32, 8, 8), (48, 4, 4), (64, 2, 2)]),
    ('test_byobnet', {}, (64, 64), [(32, 16, 16), (64, 8, 8), (128, 4, 4), (256, 2, 2)]),
    ('swin_tiny_patch4_window7_224', SMALL_SWIN, (64, 64), [(12, 16, 16), (24, 8, 8), (48, 4, 4), (96, 2, 2)]),
    ('pit_ti_distilled_224', SMALL_PIT, (64, 64), [(8, 7, 7), (16, 4, 4), (32, 2, 2)]),
    ('levit_128s', {'img_size': 64}, (64, 64), [(128, 4, 4), (256, 2, 2), (384, 1, 1)]),
]
FAMILIES = pytest.mark.parametrize('name, kwargs, size, shapes', CASES, ids=[case[0] for case in CASES])


def create(name, kwargs, **more):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=NUM_CLASSES, **kwargs, **more)


def images(size, num_images=2):
    return torch.randn(num_images, 3, *size, generator=torch.Generator().manual_seed(1))


def first(output):
    return output[0] if isinstance(output, tuple) else output


def run(branch, x, seed=2):
    torch.manual_seed(seed)
    logits, embed, _, features = branch(x)
    return logits, embed, features


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


@FAMILIES
def test_maps_are_those_of_timm(name, kwargs, size, shapes):
    model, x = create(name, kwargs).eval(), images(size)
    stages = list(stages_of(model))
    assert stages == ['stage1', 'stage2', 'stage3', 'stage4'][:len(shapes)]
    with torch.no_grad():
        plain = first(model(x))
        branch = Branch(model, 'a')
        branch.tap(stages)
        logits, _, features = run(branch, x)
        assert torch.equal(logits, plain)
        assert list(features) == stages
        assert [tuple(each.shape[1:]) for each in features.values()] == shapes
        if hasattr(model, 'num_prefix_tokens') and hasattr(model, 'blocks'):
            timms = [model.forward_intermediates(x, indices=[int(module.split('.')[-1])], intermediates_only=True)[0]
                     for module in stages_of(model).values()]
        else:
            timms = model.forward_intermediates(x, intermediates_only=True)[-len(stages):]
    for each, want in zip(features.values(), timms, strict=True):
        torch.testing.assert_close(each, want, rtol=1e-5, atol=1e-6)


@FAMILIES
def test_training_is_that_of_the_plain_model(name, kwargs, size, shapes):
    """Taps on, off and on again: logits of the plain model's forward, seeded, and no hook of what is not asked for."""
    try:
        model = create(name, kwargs, drop_rate=0.3, drop_path_rate=0.4).train()
    except TypeError:
        model = create(name, kwargs, drop_rate=0.3).train()
    x, plain = images(size), copy.deepcopy(model)
    branch, bare = Branch(model, 'a'), hooks(model)
    for names in ((), ('stage1', 'stage2', 'embed'), (), ('stage2',), ('embed',)):
        branch.tap(names)
        assert hooks(model) == bare + len(set(names) - {'embed'})
        logits, embed, features = run(branch, x)
        torch.manual_seed(2)
        assert torch.equal(logits, first(plain(x)))
        assert tuple(features or ()) == names
        assert 'embed' not in names or features['embed'] is embed
        assert not any(tap.kept or tap.on for tap in branch._features.values())


CHECKPOINTED = [case for case in CASES if case[0] in (
    'test_vit', 'deit_tiny_distilled_patch16_224', 'beit_base_patch16_224', 'test_resnet', 'test_efficientnet',
    'test_convnext', 'convnext_atto', 'swin_tiny_patch4_window7_224', 'levit_128s')]


def feature_gradients(model, x, names):
    branch = Branch(model, 'a')
    branch.tap(names)
    logits, _, features = run(branch, x)
    loss = logits.sum() + sum((i + 1) * each.square().mean() for i, each in enumerate(features.values()))
    loss.backward()
    return {'logits': logits, **features}, {key: parameter.grad for key, parameter in model.named_parameters()}


@pytest.mark.parametrize('name, kwargs, size, shapes', CHECKPOINTED, ids=[case[0] for case in CHECKPOINTED])
def test_gradients_under_checkpointing(name, kwargs, size, shapes):
    model, x = create(name, kwargs, drop_path_rate=0.3).train(), images(size)
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    names = list(stages_of(model))
    for got, want in zip(feature_gradients(other, x, names), feature_gradients(model, x, names), strict=True):
        assert list(got) == list(want)
        for key, each in want.items():
            assert (got[key] is None) == (each is None), key
            assert each is None or torch.equal(got[key], each), key


def small_pair():
    return PairWrapper(
        TinyModel(NUM_CLASSES),
        create('vit_tiny_patch16_224', {**SMALL_VIT, 'depth': 2}, drop_rate=0.2, drop_path_rate=0.2),
    )


def assert_same_output(got, want):
    for each, wanted in zip(got, want, strict=True):
        if isinstance(wanted, dict):
            assert_same_output(got_values := list(each.values()), list(wanted.values()))
            assert len(got_values) == len(wanted) and list(each) == list(wanted)
        else:
            assert (each is None) == (wanted is None)
            assert each is None or torch.equal(each, wanted)


def outputs(pair, x, features):
    pair.tap(features)
    torch.manual_seed(3)
    return pair(x)


TAPS = {'a': ('stem', 'embed'), 'b': ('stage1', 'stage4')}


def test_pair_compiled():
    pair, x = small_pair(), images((32, 32))
    compiled = copy.deepcopy(pair)
    compiled.compile(backend='eager')
    for features in ({}, TAPS):
        assert_same_output(outputs(compiled, x, features), outputs(pair, x, features))
    gradients = []
    for each in (compiled, pair):
        output = outputs(each, x, TAPS)  # taps as they are: no new compilation
        (output.features_a['stem'].mean() + output.features_b['stage1'].square().mean()).backward()
        gradients.append([parameter.grad for parameter in each.parameters()])
    for got, want in zip(*gradients, strict=True):
        assert (got is None) == (want is None) and (got is None or torch.equal(got, want))


def test_copy_has_taps_of_its_own():
    pair, x = small_pair(), images((32, 32))
    bare, keys = hooks(pair), list(pair.state_dict())
    want = outputs(pair, x, TAPS)
    assert list(pair.state_dict()) == keys
    twin = copy.deepcopy(pair)
    again = outputs(twin, x, TAPS)
    assert_same_output(again, want)
    twin.tap({})
    assert (hooks(twin), hooks(pair)) == (bare, bare + 3)
    assert_same_output(outputs(pair, x, TAPS), want)
    twin.tap({'b': ('stage2',)})
    assert list(outputs(twin, x, {'b': ('stage2',)}).features_b) == ['stage2']


def test_a_feature_that_the_next_layer_changes_is_refused():
    branch = Branch(create('test_resnet', {}), 'a')
    branch.tap(['bn1'])
    with pytest.raises(ValueError, match="model_a: the layer after 'bn1' changes its output in place; name that layer"):
        branch(torch.randn(2, 3, 32, 32))


def test_unknown_features():
    with pytest.raises(ValueError, match=r"model_a \(ResNet\) has no feature 'stage5': expected one of stage1, "
                                         "stage2, stage3, stage4, embed, or the name of a module"):
        find_module(create('test_resnet', {}), 'stage5', 'model_a')
    model = nn.Sequential(nn.Identity())
    model.feature_info = [{'module': 'blocks.0', 'reduction': 4}, {'module': '0', 'reduction': 8}]  # as MViT's, wrong
    with pytest.raises(ValueError, match=r"x \(Sequential\) has no feature 'stage1': expected one of stage2, embed"):
        find_module(model, 'stage1', 'x')
    branch = Branch(create('test_resnet', {}), 'a')
    for name, shape in (('global_pool', r'\(2, 96\)'), ('fc', r'\(2, 4\)')):
        branch.tap([name])
        with pytest.raises(ValueError, match=f"ResNet: feature '{name}' is {shape}, expected a map"):
            branch(images((64, 64)))


def test_layouts_of_outputs():
    model = nn.Identity()
    for size, grid in (((32, 32), (4, 4)), ((16, 64), (2, 8)), ((64, 16), (8, 2))):
        tokens = torch.randn(1, 16, 50)
        maps = as_map(model, 'x', [tokens], size)
        assert torch.equal(maps.flatten(2), tokens.transpose(1, 2)) and maps.shape[2:] == grid
        for output in (maps, maps.permute(0, 2, 3, 1), (maps, tokens)):
            assert torch.equal(as_map(model, 'x', [tokens, output], size), maps)
    hiera = create('hiera_tiny_224', {'img_size': 64})  # its tokens lie in the order of windows
    for owner, output in ((hiera, torch.zeros(1, 256, 96)), (model, torch.zeros(1, 7, 4)), (model, [tokens, tokens])):
        with pytest.raises(ValueError, match="feature 'x' is .*, expected a map"):
            as_map(owner, 'x', [output], (64, 64))
    with pytest.raises(ValueError, match="feature 'x' is NoneType, expected a map"):
        as_map(model, 'x', [], (64, 64))  # a layer that did not run
