"""Uniform drop path and stochastic depth that skips, in each family, against masking and a plain loop over samples."""
import copy
import re

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from small import NUM_CLASSES, shake
from timm.layers import DropPath
from timm.models.vision_transformer import ResPostBlock

from timm_vpl.core.stochastic_depth import SampleDropPath, set_uniform_drop_path

SMALL_VIT = {'img_size': 32, 'depth': 2, 'embed_dim': 24, 'num_heads': 3}
SMALL_CONVNEXT = {'depths': (1, 1, 2, 1), 'dims': (8, 8, 16, 16)}
SMALL_REGNET = {'depth': 6, 'w0': 8, 'wa': 8., 'wm': 1.7, 'group_size': 4}
SMALL_SWIN = {'img_size': 32, 'embed_dim': 16, 'depths': (2, 2), 'num_heads': (2, 4), 'window_size': 4}
# name: timm's name, kwargs, number of residual branches, of these masked where the others skip
FAMILIES = {
    'vit': ('vit_tiny_patch16_224', {**SMALL_VIT, 'depth': 3}, 6, 0),
    'vit_layer_scale': ('test_vit', {'img_size': 32, 'depth': 2, 'init_values': 0.5}, 4, 0),
    'vit_post_norm': ('vit_tiny_patch16_224', {**SMALL_VIT, 'block_fn': ResPostBlock}, 4, 4),
    'vit_parallel': ('vit_small_patch16_18x2_224', SMALL_VIT, 8, 8),
    'deit': ('deit_tiny_distilled_patch16_224', SMALL_VIT, 4, 0),
    'pit': ('pit_ti_224', {'img_size': 64, 'base_dims': [8] * 3, 'depth': [1, 2, 1]}, 8, 0),
    'swin': ('swin_tiny_patch4_window7_224', SMALL_SWIN, 8, 0),
    'swin_v2': ('swinv2_tiny_window8_256', SMALL_SWIN, 8, 8),
    'convnext': ('convnext_tiny', {**SMALL_CONVNEXT, 'ls_init_value': None}, 5, 0),
    'convnext_conv_mlp': ('convnext_atto', {**SMALL_CONVNEXT, 'use_grn': True}, 5, 0),
    'convnext_batch_norm': ('convnext_atto', {**SMALL_CONVNEXT, 'norm_layer': 'batchnorm2d'}, 5, 5),
    'regnet': ('regnety_002', SMALL_REGNET, 6, 6),
    'regnet_preact': ('regnetv_040', SMALL_REGNET, 6, 6),
    'regnet_linear_out': ('regnetz_005', SMALL_REGNET, 6, 6),
    'xcit': ('xcit_nano_12_p8_224', {'img_size': 32, 'depth': 2, 'embed_dim': 16}, 10, 4),
}
RATE = 0.4


def make_model(family, **kwargs):
    """A small float64 model in which every parameter shows in the output."""
    name, small, *_ = FAMILIES[family]
    torch.manual_seed(0)
    return shake(timm.create_model(name, num_classes=NUM_CLASSES, **small, **kwargs).double())


def images(family, num_images=6):
    size = FAMILIES[family][1].get('img_size', 32)
    return torch.randn(num_images, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def with_rate(model, rate=RATE, skip=False):
    model = copy.deepcopy(model)
    set_uniform_drop_path(model, rate, skip)
    return model.train()


def drop_paths(model):
    return [module for module in model.modules() if isinstance(module, DropPath)]


def run(model, *batches, seed=0):
    """Return outputs and all gradients, of images and parameters, after a forward each and one backward."""
    torch.manual_seed(seed)
    batches = [batch.clone().requires_grad_() for batch in batches]
    outputs = [model(batch) for batch in batches]
    weight = torch.linspace(-1, 1, outputs[0].numel(), dtype=torch.float64).view_as(outputs[0])
    model.zero_grad()
    sum((output ** 2 * weight).sum() for output in outputs).backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {**{f'output{i}': output for i, output in enumerate(outputs)},
            **{f'batch{i}': batch.grad for i, batch in enumerate(batches)}, **grads}


def assert_same(results, expected):
    assert results.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor is not None and results[name] is not None, name
        torch.testing.assert_close(
            results[name], tensor, rtol=1e-10, atol=1e-10 * max(1., float(tensor.detach().abs().max())), msg=name)


@pytest.mark.parametrize('skip', [False, True])
@pytest.mark.parametrize('family', FAMILIES)
def test_every_block_has_the_rate(family, skip):
    model = make_model(family, drop_path_rate=0.1)
    names = {name for name, module in model.named_modules() if isinstance(module, DropPath)}
    keys = list(model.state_dict())
    set_uniform_drop_path(model, RATE, skip)
    assert len(drop_paths(model)) == FAMILIES[family][2] > len(names)
    assert {path.drop_prob for path in drop_paths(model)} == {RATE}
    assert names < {name for name, module in model.named_modules() if isinstance(module, DropPath)}
    assert not any('drop_path' in name for name, module in model.named_modules() if isinstance(module, nn.Identity))
    assert list(model.state_dict()) == keys
    assert [path.hook is None for path in drop_paths(model)].count(True) == (FAMILIES[family][3 if skip else 2])


@pytest.mark.parametrize('family', FAMILIES)
def test_all_branches_dropped_leave_the_shortcut(family, monkeypatch):
    model = with_rate(make_model(family))
    in_branch = re.compile(r'attn|ffns|mlp|local_mp|conv_dw|\.conv[123]\.|\.se\.|\.norm[123]\.|\.gamma')
    no_branch = [f'{name}.' for name, block in model.named_modules() if getattr(block, 'downsample', block) is None]
    if family == 'xcit':  # the second norm of class attention is in the shortcut
        no_branch += ['cls_attn_blocks.0.norm2.', 'cls_attn_blocks.1.norm2.']
    elif family == 'regnet_preact':  # the first norm is before the shortcut
        no_branch += [name for name, _ in model.named_parameters() if '.norm1.' in name]
    branches = [name for name, _ in model.named_parameters()
                if in_branch.search(name.replace('cls_attn', 'cls')) and not name.startswith(tuple(no_branch))]
    kept = run(with_rate(model, 1e-9), images(family))
    monkeypatch.setattr(torch, 'rand', torch.ones)
    dropped = run(model, images(family))
    assert len(branches) >= FAMILIES[family][2]
    assert all(kept[name].any() and not dropped[name].any() for name in branches)


@pytest.mark.parametrize('family', FAMILIES)
def test_skipping_equals_masking(family, caplog):
    model, batch = make_model(family), images(family)
    skipping, masking = with_rate(model, skip=True), with_rate(model)
    state = torch.get_rng_state()
    with torch.no_grad():  # in evaluation both are the model, and draw nothing
        assert all(torch.equal(each.eval()(batch), model.eval()(batch)) for each in (skipping, masking))
    assert torch.equal(torch.get_rng_state(), state)
    skipping.train(), masking.train()
    rows = []
    for path in drop_paths(skipping):
        path.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    assert_same(run(skipping, batch), run(masking, batch))
    *_, branches, masked = FAMILIES[family]
    if masked < branches:
        assert len(rows) == branches and rows.count(len(batch)) <= masked + 1 and min(rows) < len(batch)
    assert_same(run(skipping, batch, batch + 1, seed=1), run(masking, batch, batch + 1, seed=1))
    if 'conv' in family or 'regnet' in family:
        skipping.to(memory_format=torch.channels_last)
        assert_same(run(skipping, batch.to(memory_format=torch.channels_last)), run(masking, batch))
    # Branches that are masked where others skip are named, once.
    messages = [record.getMessage() for record in caplog.records if record.name == 'timm_vpl.core.stochastic_depth']
    assert len(messages) == (masked > 0)
    if masked:
        assert f'{masked} of {branches} residual branches' in messages[0] and type(model).__name__ in messages[0]


@pytest.mark.parametrize('family', ['vit', 'swin', 'convnext', 'xcit'])
def test_a_row_runs_where_all_are_dropped(family):
    model, batch = make_model(family), images(family, 2)
    skipping, masking = with_rate(model, 0.9, skip=True), with_rate(model, 0.9)
    outputs = []
    drop_paths(skipping)[0].register_forward_hook(lambda _, args, output: outputs.append((len(args[0]), output)))
    for seed in range(3):
        assert_same(run(skipping, batch, seed=seed), run(masking, batch, seed=seed))
    assert any(rows == 1 and not output.any() for rows, output in outputs)


@pytest.mark.parametrize('skip', [False, True])
def test_drop_frequency(skip):
    model = with_rate(make_model('vit'), 0.3, skip)
    dropped = []
    for path in drop_paths(model):
        path.register_forward_hook(lambda _, args, output: dropped.append((output == 0).flatten(1).all(1).double()))
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(30):
            model(images('vit', 64))
    rates = torch.stack(dropped).view(30, 6, 64)
    assert (rates.mean((0, 2)) - 0.3).abs().max() < 4 * (0.3 * 0.7 / (30 * 64)) ** 0.5
    assert (rates.mean((0, 1)) - 0.3).abs().max() < 4.5 * (0.3 * 0.7 / (30 * 6)) ** 0.5  # no sample is special
    assert torch.corrcoef(rates.transpose(0, 1).flatten(1)).tril(-1).abs().max() < 4 * (30 * 64) ** -0.5


@pytest.mark.parametrize('skip', [False, True])
@pytest.mark.parametrize('family', ['vit', 'swin', 'convnext', 'xcit'])
def test_gradient_checkpointing(family, skip):
    model = with_rate(make_model(family), skip=skip)
    expected = run(model, images(family))
    checkpointed = copy.deepcopy(model)
    checkpointed.set_grad_checkpointing()
    for seed in (1, 0):
        results = run(checkpointed, images(family), seed=seed)
    assert_same(results, expected)


def test_copy_is_independent():
    model = with_rate(make_model('vit'), skip=True)
    model(images('vit'))
    clone, expected = copy.deepcopy(model), run(model, images('vit'))
    del model
    assert_same(run(clone, images('vit')), expected)
    for skip in (True, False):  # a second call replaces the first
        set_uniform_drop_path(clone, RATE, skip)
        assert_same(run(clone, images('vit')), expected)
    assert not any(module._forward_pre_hooks for module in clone.modules())


@pytest.mark.parametrize('skip', [False, True])
def test_block_equals_a_loop_over_samples(skip):
    model, keep = make_model('vit_layer_scale'), 1 - RATE
    block = with_rate(model, skip=skip).blocks[0]
    tokens = torch.randn(8, 7, 64, dtype=torch.float64)
    torch.manual_seed(3)
    output = block(tokens)
    torch.manual_seed(3)
    masks = [(torch.rand(8) < keep).tolist() for _ in range(2)]

    def layer_norm(x, norm):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + norm.eps).sqrt() \
            * norm.weight + norm.bias

    def attention(x):
        heads = []
        for q, k, v in zip(*(part.chunk(block.attn.num_heads, dim=-1)
                             for part in block.attn.qkv(x).chunk(3, dim=-1)), strict=True):
            heads.append((q @ k.T / q.shape[-1] ** 0.5).softmax(dim=-1) @ v)
        return block.attn.proj(torch.cat(heads, dim=-1))

    assert 0 < sum(masks[0]) < 8 and 0 < sum(masks[1]) < 8
    for i, x in enumerate(tokens):
        if masks[0][i]:
            x = x + block.ls1.gamma * attention(layer_norm(x, block.norm1)) / keep
        if masks[1][i]:
            x = x + block.ls2.gamma * block.mlp.fc2(F.gelu(block.mlp.fc1(layer_norm(x, block.norm2)))) / keep
        torch.testing.assert_close(output[i], x, rtol=1e-10, atol=1e-10)


def test_scale_by_keep_stays():
    block = make_model('vit', drop_path_rate=0.5).blocks[1]
    block.drop_path1.scale_by_keep = False
    set_uniform_drop_path(block, RATE)
    assert (block.drop_path1.scale_by_keep, block.drop_path2.scale_by_keep) == (False, True)
    ones = torch.ones(64, 2, 3)
    assert block.train().drop_path1(ones).unique().tolist() == [0, 1]
    torch.testing.assert_close(block.drop_path2(ones).unique(), torch.tensor([0, 1 / (1 - RATE)]))


def test_hybrid_and_other_families_work_too():
    with torch.device('meta'):
        models = [timm.create_model(name) for name in ('vit_small_r26_s32_224', 'test_resnet', 'test_efficientnet')]
    for model in models:
        set_uniform_drop_path(model, RATE)
        assert {path.drop_prob for path in drop_paths(model)} == {RATE}
        assert all(isinstance(path, SampleDropPath) for path in drop_paths(model))
    assert len(drop_paths(models[1])) == 4  # timm has None in their place


@pytest.mark.parametrize('name, message', [
    ('vgg11', 'VGG has no drop path; families that work: VisionTransformer'),
    ('mobileone_s0', 'ByobNet: drop path of MobileOneBlock is not .*; families that work: VisionTransformer'),
    ('mobilevit_xxs', 'ByobNet: drop path of'),
])
def test_refused_models(name, message):
    with torch.device('meta'):
        model = timm.create_model(name)
    before = list(map(type, model.modules()))
    with pytest.raises(ValueError, match=message):
        set_uniform_drop_path(model, RATE)
    assert list(map(type, model.modules())) == before


@pytest.mark.parametrize('rate', [0, 1, -0.1, 1.5, float('nan')])
def test_refused_rates(rate):
    with pytest.raises(ValueError, match=rf'drop-path rate is {rate}, expected a value in \(0, 1\)'):
        set_uniform_drop_path(nn.Identity(), rate)
