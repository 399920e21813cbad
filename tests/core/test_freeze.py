"""Freezing a branch's first layers: which weights and statistics stay as they are, what is optimized and exported."""
import copy
import logging
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import timm
import torch
from runs import SMALL, last, run
from small import CPU, NUM_CLASSES, clone_state, images, make_model
from timm.data import resolve_model_data_config
from timm.models import save_for_hf

from timm_vpl import PairWrapper
from timm_vpl.core.names import SIDES
from timm_vpl.core.processes import Processes
from timm_vpl.core.task import PairTask
from timm_vpl.engine.models import create_pair, resolve_data
from timm_vpl.engine.optim import create_criterion, create_optimizer, learning_rates
from timm_vpl.options.sections import BatchNorm
from timm_vpl.options.train import parse_args

# What each of a model's layer groups holds, from the input to the head, which is not among them.
GROUPS = {name: [group.split() for group in groups.split('|')] for name, groups in {
    'test_resnet': 'conv1 bn1 | layer1 | layer2 | layer3 | layer4',
    'test_efficientnet': 'conv_stem bn1 | blocks.0 | blocks.1 | blocks.2 | blocks.3 | blocks.4 conv_head bn2',
    'test_convnext': 'stem | stages.0 | stages.1 | stages.2 | stages.3',
    'test_vit': 'cls_token pos_embed patch_embed | blocks.0 | blocks.1 | blocks.2 | blocks.3 | blocks.4 | '
                'blocks.5 norm',
}.items()}
PAIRS = [('test_resnet', 'test_vit'), ('test_efficientnet', 'test_convnext'), ('test_convnext', 'test_efficientnet')]
ONE_STAGE = ['--x', '0', '--y', '0', '--lr', '0.01']


def is_frozen(name, key, depth):
    """Whether a parameter or buffer of a model lies in its first `depth` groups."""
    return any(
        key == part or key.startswith(f'{part}.') for group in GROUPS[name][:depth] for part in group)


def create_model(name, **kwargs):
    return make_model(name, **({'depth': 6} if name == 'test_vit' else {}), **kwargs)


def start(names, *words):
    """The options and the pair, built as the command builds it."""
    options = parse_args([
        '--dataset', 'digits', '--num-classes', str(NUM_CLASSES), '--model-a', names[0], '--model-b', names[1], *SMALL,
        *ONE_STAGE, *words])
    return options, create_pair(options, resolve_data(options), NUM_CLASSES, Processes(CPU))


def start_task(options, pair):
    task = PairTask(pair, create_criterion(options, 1, CPU), verbose=False)
    task.set_epoch(0)
    return task, create_optimizer(options, pair, learning_rates(options, 1))


def train_steps(task, optimizer, set_training_mode):
    for seed in range(2):
        set_training_mode()
        task(images(8, seed), torch.arange(8) % NUM_CLASSES)['loss'].backward()
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema()
        task.eval()  # as a validation between epochs does


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
        assert (False in counts) == (depth > 0)
    pair.requires_grad_(True)
    resting = list(pair._resting)
    for depth in (len(GROUPS[name]) + 1, -1):
        message = f'{depth} layer groups: model_{side} .* has {len(GROUPS[name])} before its head'
        with pytest.raises(ValueError, match=message):
            pair.freeze(side, depth)
        assert all(parameter.requires_grad for parameter in pair.parameters()) and pair._resting == resting


def test_a_model_without_layer_groups_is_refused():
    with torch.device('meta'):
        pair = PairWrapper(create_model('test_resnet'), create_model('rdnet_tiny'))
    with pytest.raises(ValueError, match=r'model_b \(RDNet\) has no coarse layer groups'):
        pair.freeze('b', 1)


@pytest.mark.parametrize('name', [
    'cait_xxs24_224', 'crossvit_9_240', 'deit_tiny_distilled_patch16_224', 'dla34', 'efficientvim_m1',
    'mobilenetv3_small_050', 'pit_ti_224', 'resnet50_clip_gap'])
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


def test_layers_that_were_never_trained_are_warned_of(caplog):
    start(('test_resnet', 'test_vit'), '--freeze-depth-b', '2')
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert [text for text in warnings if 'freeze' in text] == [
        '--freeze-depth-b 2: freezes untrained layers (no --pretrained)']


# training


@pytest.mark.parametrize(('names', 'how'), zip(PAIRS, ['task.train()', 'pair.train()', 'a copy'], strict=True), ids=str)
def test_frozen_layers_stay_and_the_others_move(names, how):
    depths = (3, 2)
    options, pair = start(names, '--freeze-depth-a', '3', '--freeze-depth-b', '2')
    pair = copy.deepcopy(pair) if how == 'a copy' else pair
    task, optimizer = start_task(options, pair)
    task.setup_ema(decay=0.5)
    before = clone_state(pair.state_dict())
    train_steps(task, optimizer, pair.train if how == 'pair.train()' else task.train)
    after, averaged = pair.state_dict(), task.get_trainable_module(ema=True).module.state_dict()
    assert before.keys() == after.keys() == averaged.keys()
    statistics = {True: 0, False: 0}
    for key in before:
        part, _, inner = key.partition('.')
        side = part[-1] if part.startswith('model_') else None
        frozen = side is not None and is_frozen(names[SIDES.index(side)], inner, depths[SIDES.index(side)])
        assert torch.equal(before[key], after[key]) == frozen, key
        assert torch.equal(before[key], averaged[key]) == frozen, key
        statistics[frozen] += 'running_' in key
    assert statistics[True] and statistics[False]  # both kinds of BatchNorm are there


@pytest.mark.parametrize(('names', 'side'), [
    (('test_resnet', 'test_vit'), 'a'), (('test_vit', 'test_efficientnet'), 'b')], ids=str)
def test_branch_frozen_up_to_its_head_is_a_fixed_function(names, side):
    # Its BatchNorm normalises by the running statistics in training too.
    name = names[SIDES.index(side)]
    options, pair = start(names, f'--freeze-depth-{side}', str(len(GROUPS[name])))
    train_steps(*start_task(options, pair), pair.train)
    logits, embed, *_ = pair.train().run(side, images())
    assert torch.equal(embed, pair.eval().run(side, images())[1])
    assert logits.requires_grad and torch.equal(logits, pair.parts[side].classifier(embed))


def test_synchronized_batch_norm(monkeypatch):
    # Converted without the GPU that it runs on, and evaluated, where it needs none.
    names = ('test_resnet', 'test_efficientnet')
    words = '--freeze-depth-a', '3', '--freeze-depth-b', '3'
    plain_options, plain = start(names, *words)
    monkeypatch.setattr(PairWrapper, 'to', lambda pair, device: pair)
    options = replace(plain_options, batch_norm=BatchNorm(sync_bn=True))
    processes = Processes(SimpleNamespace(type='cuda'), world_size=2)
    pair = create_pair(options, resolve_data(options), NUM_CLASSES, processes)
    torch.testing.assert_close(pair.eval()(images())[:2], plain.eval()(images())[:2])
    pair.train()
    converted = []
    for side, name in zip(SIDES, names, strict=True):
        for key, module in pair.branch(side).named_modules():
            if isinstance(module, torch.nn.SyncBatchNorm):
                converted.append(module)
                assert module.training != is_frozen(name, key, 3), key
    assert len(converted) == sum(isinstance(module, torch.nn.BatchNorm2d) for module in plain.modules())


# a whole run


def save_pretrained(folder, name):
    """Write a model of 7 classes as timm exports it, its BatchNorm with statistics of its own; return its weights."""
    model = create_model(name, num_classes=7)
    model.train()(images())
    save_for_hf(model, str(folder), data_config={**resolve_model_data_config(model), 'input_size': (3, 32, 32)})
    return model.state_dict()


def test_run_and_export_of_partly_frozen_branches(digits_folder, tmp_path, caplog):
    branches = {'a': ('test_resnet', 3), 'b': ('test_vit', 4)}
    pretrained = {side: save_pretrained(tmp_path / side, name) for side, (name, _) in branches.items()}
    folder = run(
        digits_folder, tmp_path, '--model-a', f'local-dir:{tmp_path / "a"}', '--model-b', f'local-dir:{tmp_path / "b"}',
        '--pretrained', '--freeze-depth-a', '3', '--freeze-depth-b', '4', '--layer-decay', '0.8', *ONE_STAGE,
        '--epochs', '1', '--export', models=[])
    assert 'untrained layers' not in caplog.text
    averaged = last(folder)['state_dict_ema']
    for side, (name, depth) in branches.items():
        exported = timm.create_model(f'local-dir:{folder / "export" / f"vpl-{name}"}', pretrained=True)
        head = {f'{exported.pretrained_cfg["classifier"]}.{kind}' for kind in ('weight', 'bias')}
        assert exported.state_dict().keys() == pretrained[side].keys()
        for key, value in exported.state_dict().items():
            assert torch.equal(value, averaged[f'model_{side}.{key}']), key
            same = key not in head and torch.equal(value, pretrained[side][key])
            assert same == is_frozen(name, key, depth), key
