"""Freezing a branch's first layers: which weights and statistics stay as they are, what is optimized and exported."""
import copy
import logging
import re
from types import SimpleNamespace

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2

from timm_vpl import PairWrapper
from timm_vpl.cli import train
from timm_vpl.core.task import PairTask
from timm_vpl.engine.build import (
    create_criterion,
    create_optimizer,
    create_pair,
    learning_rates,
    resolve_data,
)
from timm_vpl.engine.checkpoint import read_checkpoint
from timm_vpl.engine.device import init_device
from timm_vpl.options.options import parse_args

SIZE = 32
NUM_CLASSES = 4

# What each of a model's layer groups holds, from the input to the head, which is not among them.
GROUPS = {
    'test_resnet': [('conv1', 'bn1'), ('layer1',), ('layer2',), ('layer3',), ('layer4',)],
    'test_efficientnet': [
        ('conv_stem', 'bn1'), ('blocks.0',), ('blocks.1',), ('blocks.2',), ('blocks.3',),
        ('blocks.4', 'conv_head', 'bn2')],
    'test_convnext': [('stem',), ('stages.0',), ('stages.1',), ('stages.2',), ('stages.3',)],
    'test_vit': [
        ('cls_token', 'pos_embed', 'patch_embed'), ('blocks.0',), ('blocks.1',), ('blocks.2',), ('blocks.3',),
        ('blocks.4',), ('blocks.5', 'norm')],
}
PAIRS = [('test_resnet', 'test_vit'), ('test_efficientnet', 'test_convnext'), ('test_convnext', 'test_efficientnet')]
SMALL = [
    '--img-size', str(SIZE), '-b', '8', '--epochs', '1', '--warmup-epochs', '0', '--lr', '0.01', '--workers', '0',
    '--device', 'cpu', '--x', '0', '--y', '0', '--model-ema-decay', '0.5']


def is_frozen(name, key, depth):
    """Whether a parameter or buffer of a model lies in its first `depth` groups."""
    return any(
        key == part or key.startswith(f'{part}.') for group in GROUPS[name][:depth] for part in group)


def create_model(name, **kwargs):
    return timm.create_model(name, num_classes=NUM_CLASSES, **({'img_size': SIZE} if 'vit' in name else {}), **kwargs)


def images(num_images=8, seed=0):
    return torch.randn(num_images, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def start(names, *options):
    """The options and the pair, built as the command builds it."""
    args = parse_args([
        '--dataset', 'digits', '--num-classes', str(NUM_CLASSES), '--model-a', names[0], '--model-b', names[1], *SMALL,
        *options])
    device = init_device(args)
    return args, create_pair(args, resolve_data(args), device)


def start_task(args, pair):
    task = PairTask(pair, create_criterion(args, 1, torch.device('cpu')), verbose=False)
    task.set_epoch(0)
    return task


def train_steps(task, optimizer, set_training_mode, steps=2):
    for i in range(steps):
        set_training_mode()
        task(images(seed=i), torch.arange(8) % NUM_CLASSES)['loss'].backward()
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema()
        task.eval()  # as a validation between epochs does


def state_of(module):
    return {key: tensor.clone() for key, tensor in module.state_dict().items()}


def error_line(capsys, argv):
    """The one line with which the command ends, status 2."""
    capsys.readouterr()
    try:
        status = train([str(arg) for arg in argv])
    except SystemExit as e:
        status = e.code
    written = capsys.readouterr().err.strip()
    lines = [line for line in written.splitlines() if line.startswith('train_vpl.py: error: ')]
    assert status == 2 and len(lines) == 1 and written.endswith(lines[0]) and 'Traceback' not in written, written
    return lines[0].removeprefix('train_vpl.py: error: ')


# which weights


@pytest.mark.parametrize('side', ['a', 'b'])
@pytest.mark.parametrize('name', GROUPS)
def test_frozen_weights_at_each_depth(name, side):
    other = 'test_vit' if name != 'test_vit' else 'test_resnet'
    names = (name, other) if side == 'a' else (other, name)
    with torch.device('meta'):
        pair = PairWrapper(*map(create_model, names))
    for depth in range(len(GROUPS[name]) + 1):
        pair.freeze(side, depth)
        for key, parameter in pair.named_parameters():
            part, _, key = key.partition('.')
            frozen = part == f'model_{side}' and is_frozen(name, key, depth)
            assert parameter.requires_grad == (not frozen), (depth, part, key)
        counts = [parameter.requires_grad for parameter in pair.branch(side).parameters()]
        assert (False in counts) == (depth > 0) and all(p.requires_grad for p in pair.parts[side].heads[0].parameters())


def test_freezing_again_goes_deeper():
    pair = PairWrapper(create_model('test_resnet'), create_model('test_vit'))
    pair.freeze('a', 1)
    pair.freeze('a', 3)
    pair.freeze('b', 2)
    pair.train()
    for key, parameter in pair.model_a.named_parameters():
        assert parameter.requires_grad != is_frozen('test_resnet', key, 3), key
    for key, module in pair.model_a.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.training != is_frozen('test_resnet', key, 3), key


@pytest.mark.parametrize('name', [
    'cait_xxs24_224', 'coat_tiny', 'crossvit_9_240', 'deit_tiny_distilled_patch16_224', 'dla34', 'efficientvim_m1',
    'hrnet_w18_small', 'levit_128s', 'mobilenetv3_small_050', 'pit_ti_224', 'poolformer_s12', 'resnet50_clip_gap',
])
def test_head_is_trained_at_any_depth(name):
    # Families whose layers timm groups in ways of their own, or not at all.
    with torch.device('meta'):
        pair = PairWrapper(timm.create_model(name, num_classes=NUM_CLASSES), None)
    with pytest.raises(ValueError) as caught:
        pair.freeze('a', 1000)
    groups = int(re.search(r'has (\d+) before its head', str(caught.value))[1])
    assert all(parameter.requires_grad for parameter in pair.parameters())
    head = [parameter for head in pair.parts['a'].heads for parameter in head.parameters()]
    frozen = []
    for depth in (1, groups // 2, groups):
        pair.freeze('a', depth)
        assert head and all(parameter.requires_grad for parameter in head)
        frozen.append(sum(not parameter.requires_grad for parameter in pair.parameters()))
    assert 0 < frozen[0] < frozen[1] < frozen[2] < len(list(pair.parameters()))


def test_model_without_layer_groups():
    with torch.device('meta'):
        pair = PairWrapper(create_model('rdnet_tiny'), None)
    with pytest.raises(ValueError, match=r'model_a \(RDNet\) has no coarse layer groups'):
        pair.freeze('a', 1)


@pytest.mark.parametrize('name', GROUPS)
def test_depth_out_of_range(name):
    groups = len(GROUPS[name])
    with torch.device('meta'):
        pair = PairWrapper(create_model('test_resnet'), create_model(name))
    for depth in (groups + 1, 99, -1):
        with pytest.raises(ValueError, match=f'{depth} layer groups: model_b .* has {groups} before its head'):
            pair.freeze('b', depth)
    assert all(parameter.requires_grad for parameter in pair.parameters()) and pair._resting == []


@pytest.mark.parametrize(('options', 'message'), [
    (['--freeze-depth-a', '6'], r'--freeze-depth-a: 6 layer groups: model_a (ResNet) has 5 before its head'),
    (['--freeze-depth', '6'], r'--freeze-depth-a: 6 layer groups: model_a (ResNet) has 5 before its head'),
    (['--freeze-depth-b', '8'], r'--freeze-depth-b: 8 layer groups: model_b (VisionTransformer) has 7 before its head'),
    (['--freeze-depth-b', '-1'], '--freeze-depth-b'),
    (['--freeze-depth', 'all'], '--freeze-depth'),
], ids=' '.join)
def test_depth_out_of_range_in_the_command(capsys, digits_folder, tmp_path, options, message):
    argv = [digits_folder, '--model-a', 'test_resnet', '--model-b', 'test_vit', *SMALL, '--output', tmp_path]
    assert error_line(capsys, [*argv, *options]).startswith(message)
    assert not any(tmp_path.iterdir())


def test_layers_that_were_never_trained_are_warned_of(caplog):
    start(('test_resnet', 'test_vit'), '--freeze-depth-b', '2')
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert [text for text in warnings if 'freeze' in text] == [
        '--freeze-depth-b 2: freezes layers that were never trained (no --pretrained)']


# training


@pytest.mark.parametrize('how', ['task.train()', 'pair.train()', 'a copy'])
@pytest.mark.parametrize('names', PAIRS, ids='+'.join)
def test_frozen_layers_stay_and_the_others_move(names, how):
    depths = (3, 2)
    args, pair = start(names, '--freeze-depth-a', '3', '--freeze-depth-b', '2')
    task = start_task(args, pair)
    if how == 'a copy':
        task = copy.deepcopy(task)
        pair = task.trainable_module
    optimizer = create_optimizer(args, pair, learning_rates(args))
    task.setup_ema(decay=0.5)
    before = state_of(pair)
    train_steps(task, optimizer, pair.train if how == 'pair.train()' else task.train)
    after, averaged = state_of(pair), task.get_trainable_module(ema=True).module.state_dict()
    assert before.keys() == after.keys() == averaged.keys()
    statistics = {True: 0, False: 0}
    for key in before:
        part, _, inner = key.partition('.')
        side = part[-1] if part.startswith('model_') else None
        frozen = side is not None and is_frozen(names['ab'.index(side)], inner, depths['ab'.index(side)])
        assert torch.equal(before[key], after[key]) == frozen, key
        assert torch.equal(before[key], averaged[key]) == frozen, key
        statistics[frozen] += 'running_' in key
    assert statistics[True] and statistics[False]  # both kinds of BatchNorm are there
    assert all((p.grad is None) or p.requires_grad for p in pair.parameters())


@pytest.mark.parametrize(('names', 'side'), [
    (('test_resnet', 'test_vit'), 'a'),
    (('test_vit', 'test_efficientnet'), 'b'),
    (('test_efficientnet', 'test_convnext'), 'b'),
], ids=str)
def test_branch_frozen_up_to_its_head_is_a_fixed_function(names, side):
    # Its BatchNorm normalises by the running statistics in training too.
    name = names['ab'.index(side)]
    args, pair = start(names, f'--freeze-depth-{side}', str(len(GROUPS[name])))
    train_steps(start_task(args, pair), create_optimizer(args, pair, learning_rates(args)), pair.train)
    resting, embeddings = [], []
    for mode in (True, False):
        pair.train(mode)
        embeddings.append(pair.run(side, images())[1].detach())
        resting.append([module.training for module in pair.branch(side).modules() if hasattr(module, 'running_mean')])
    assert torch.equal(*embeddings) and not any(map(any, resting))
    weight = pair.parts[side].classifier.weight
    assert weight.requires_grad and torch.equal(pair.run(side, images())[0], pair.parts[side].classifier(embeddings[0]))


def test_synchronized_batch_norm(monkeypatch):
    # Converted without the GPU that it runs on, and evaluated, where it needs none.
    names = ('test_resnet', 'test_efficientnet')
    args, plain = start(names, '--freeze-depth-a', '3', '--freeze-depth-b', '3')
    monkeypatch.setattr(PairWrapper, 'to', lambda pair, device: pair)
    args.sync_bn = args.distributed = True
    pair = create_pair(args, resolve_data(args), SimpleNamespace(type='cuda'))
    converted = [module for module in pair.modules() if isinstance(module, torch.nn.SyncBatchNorm)]
    assert len(converted) == sum(isinstance(module, torch.nn.BatchNorm2d) for module in plain.modules())
    for got, want in zip(pair.eval()(images())[:2], plain.eval()(images())[:2], strict=True):
        torch.testing.assert_close(got, want)
    pair.train()
    for side, name in zip('ab', names, strict=True):
        for key, module in pair.branch(side).named_modules():
            if isinstance(module, torch.nn.SyncBatchNorm):
                assert module.training != is_frozen(name, key, 3), key


# the optimizer


def settings(optimizer, pair):
    """What each parameter gets, by name: (scale of its learning rate, weight decay)."""
    names = {id(parameter): name for name, parameter in pair.named_parameters()}
    return {
        names[id(parameter)]: (group.get('lr_scale', 1.), group['weight_decay'])
        for group in optimizer.param_groups
        for parameter in group['params']
    }


@pytest.mark.parametrize('options', [
    [],
    ['--layer-decay-a', '0.8', '--layer-decay-b', '0.6'],
    ['--layer-decay-b', '0.7', '--layer-decay-min-scale-b', '0.3', '--weight-decay-a', '0.1'],
], ids=lambda options: f'{len(options)} options')
@pytest.mark.parametrize('names', PAIRS[:2], ids='+'.join)
def test_optimizer_has_the_trainable_weights_as_without_freezing(names, options):
    found = {}
    for depths in (('0', '0'), ('2', '3')):
        args, pair = start(names, *options, '--freeze-depth-a', depths[0], '--freeze-depth-b', depths[1])
        found[depths] = settings(create_optimizer(args, pair, learning_rates(args)), pair)
        trainable = {name for name, parameter in pair.named_parameters() if parameter.requires_grad}
        assert found[depths].keys() == trainable
    whole, part = found.values()
    assert len(part) < len(whole) and part == {name: whole[name] for name in part}
    scales = {name[6]: set() for name in part if name.startswith('model_')}
    for name, (scale, _) in part.items():
        scales.get(name.removeprefix('model_')[0], set()).add(scale)
    assert all((len(scales[side]) > 1) == (f'--layer-decay-{side}' in options) for side in 'ab')


@pytest.mark.parametrize('layer_decay', [None, 0.7])
def test_timms_own_optimizer_of_a_frozen_pair(layer_decay):
    pair = PairWrapper(create_model('test_resnet'), create_model('test_vit'))
    whole = settings(create_optimizer_v2(pair, 'adamw', lr=1, weight_decay=0.1, layer_decay=layer_decay), pair)
    pair.freeze('a', 2)
    pair.freeze('b', 4)
    part = settings(create_optimizer_v2(pair, 'adamw', lr=1, weight_decay=0.1, layer_decay=layer_decay), pair)
    assert part == {name: whole[name] for name, p in pair.named_parameters() if p.requires_grad}


# a whole run


def save_pretrained(folder, name, seed):
    """Write a model of 7 classes as timm exports it, its BatchNorm with statistics of its own; return its weights."""
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=7, **({'img_size': SIZE} if 'vit' in name else {}))
    model.train()(images(seed=seed))
    save_for_hf(
        model, str(folder), data_config={**resolve_model_data_config(model), 'input_size': (3, SIZE, SIZE)})
    return state_of(model)


def test_run_and_export_of_partly_frozen_branches(digits_folder, tmp_path, caplog):
    names, depths, pretrained = ('test_resnet', 'test_vit'), (3, 4), {}
    for side, name in zip('ab', names, strict=True):
        pretrained[side] = save_pretrained(tmp_path / side, name, seed=ord(side))
    assert train([
        str(digits_folder), '--model-a', f'local-dir:{tmp_path / "a"}', '--model-b', f'local-dir:{tmp_path / "b"}',
        '--pretrained', '--freeze-depth-a', '3', '--freeze-depth-b', '4', '--layer-decay', '0.8', *SMALL,
        '--output', str(tmp_path), '--experiment', 'run']) == 0
    assert 'never trained' not in caplog.text
    run = tmp_path / 'run'
    checkpoint = read_checkpoint(str(run / 'last.pth.tar'))
    for side, name, depth in zip('ab', names, depths, strict=True):
        exported = timm.create_model(f'local-dir:{run / "export" / f"vpl-{name}"}', pretrained=True)
        state = exported.state_dict()
        averaged = {
            key.removeprefix(f'model_{side}.'): tensor for key, tensor in checkpoint['state_dict_ema'].items()
            if key.startswith(f'model_{side}.')}
        assert exported.num_classes == NUM_CLASSES and state.keys() == averaged.keys() == pretrained[side].keys()
        head = {f'{timm.get_pretrained_cfg(name).classifier}.{kind}' for kind in ('weight', 'bias')}
        for key in state:
            assert torch.equal(state[key], averaged[key]), key
            same = key not in head and torch.equal(state[key], pretrained[side][key])
            assert same == is_frozen(name, key, depth), key
