"""Branches with images of their own size and statistics: what each sees, training, validation, export."""
import copy
import json
import math
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from runs import rows, run
from small import CPU
from timm.data import create_transform, resolve_model_data_config
from timm.models import save_for_hf
from torch.testing import assert_close

from timm_vpl.cli import main
from timm_vpl.core.inputs import InputTransform
from timm_vpl.core.names import SIDES
from timm_vpl.core.processes import Processes
from timm_vpl.data.loaders import PairEvalLoader, create_eval_loaders
from timm_vpl.data.splits import create_split
from timm_vpl.engine.log import epoch_terms
from timm_vpl.engine.loop import train_one_epoch
from timm_vpl.engine.models import create_branch, loader_config, resolve_data
from timm_vpl.engine.run import create_run
from timm_vpl.options.train import parse_args

HALF = {'mean': (0.5, 0.5, 0.5), 'std': (0.5, 0.5, 0.5)}  # timm's small models
IMAGENET = {'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225)}
OTHER_B = ['--mean-b', '0.4', '--std-b', '0.3']
OTHER_A = ['--mean-a', '0.4', '--std-a', '0.3']
SIZES = ['--img-size-a', '48', '--img-size-b', '64']
SWAPPED = ['--img-size-a', '64', '--img-size-b', '48']
SAME = ['--img-size', '64']
QUICK = [
    '-b', '20', '--epochs', '1', '--warmup-epochs', '0', '--lr', '0.002', '--workers', '0', '--device', 'cpu',
    '--x', '0', '--y', '0', '--model-ema-decay', '0.5', '--crop-pct', '1.0', '--interpolation', 'bicubic',
    '--seed', '5']  # 2 updates an epoch
RGBA = ['--input-img-mode', 'RGBA', '--aa', '']  # Pillow equalizes and solarizes no such image

# Across families: with and without BatchNorm, one classifier and two, convolutions as classifiers, both poolings.
PAIRS = {
    'test_resnet + test_vit': [*SIZES, *OTHER_B],
    'test_efficientnet + test_vit': [*SWAPPED, *OTHER_A, '--gp-b', 'avg'],
    'test_convnext + deit_tiny_distilled_patch16_224': [
        *SIZES, *OTHER_B, '--model-kwargs-b', 'depth=2', 'embed_dim=48', 'num_heads=3'],
    'test_nfnet + test_vit4': [*SAME, *OTHER_A, '--method', 'dml'],
    'lcnet_035 + mobilevit_xxs': [*SIZES, '--mean-b', '0', '--std-b', '1'],
    'test_mambaout + test_coatnet': [*SIZES, *OTHER_B, '--interpolation-a', 'bilinear'],
    'fasternet_t0 + vit_tiny_r_s16_p8_224': [*SAME, *OTHER_A, '--in-chans', '1', '--model-kwargs-b', 'depth=2'],
    'efficientvit_b0 + swin_tiny_patch4_window7_224': [
        '--img-size-a', '64', '--img-size-b', '56', *OTHER_B, '--model-kwargs-b', 'embed_dim=24'],
}
QUICK_PAIRS = list(PAIRS)[:3] + ['test_mambaout + test_coatnet']
SMALL_PAIR = 'test_resnet + test_vit'


def parse(data, pair, *options):
    """The options of a pair given as 'MODEL_A + MODEL_B', and timm's configuration of each branch."""
    model_a, model_b = pair.split(' + ')
    parsed = parse_args([str(data), '--model-a', model_a, '--model-b', model_b, *QUICK, *map(str, options)])
    return parsed, resolve_data(parsed)


def start_run(data, output, pair, *options):
    """The parts of a run as the command builds them, and the configurations of the branches."""
    parsed, configs = parse(data, pair, '--output', output, '--experiment', 'run', *options)
    run = create_run(parsed, Processes(CPU))
    run.task.set_epoch(0)
    return run, configs


def image_paths(data):
    return sorted((Path(data) / 'validation').rglob('*.png'), key=lambda path: (path.parent.name, int(path.stem)))


def own_images(data, config):
    """The validation images, prepared by timm for a model of this configuration."""
    mode = {1: 'L', 3: 'RGB', 4: 'RGBA'}[config['input_size'][0]]
    transform = create_transform(**config, is_training=False, use_prefetcher=True)  # to arrays of bytes
    images = torch.stack([transform(Image.open(path).convert(mode)) for path in image_paths(data)])
    mean, std = (torch.tensor([255 * value for value in config[key]]).view(-1, 1, 1) for key in ('mean', 'std'))
    return (images - mean) / std


def bare_model(run, side, configs, ema=False):
    """The model of a branch by itself, built by timm, with its weights."""
    pair = run.task.get_trainable_module(ema=ema)
    pair = pair.module if ema else pair
    model = create_branch(run.options, side, configs[side], run.pair.num_classes)
    model.load_state_dict(pair.branch(side).state_dict())
    return model.eval()


def pixels(images, config):
    """Undo the normalisation."""
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ('mean', 'std'))
    return images * std + mean


def eval_batch(run):
    """All validation images, as the run's loader gives them to the pair."""
    [(input, _)] = run.loader_eval
    return input


@torch.inference_mode()
def assert_sees_own_images(run, data, configs):
    """Each branch gives what its model alone says of images that timm prepares for it: to the bit."""
    output = run.pair.eval()(eval_batch(run))
    for side, logits in zip(SIDES, output[:2], strict=True):
        assert torch.equal(logits, bare_model(run, side, configs)(own_images(data, configs[side])))


# what each branch sees


@pytest.mark.parametrize('pair', [
    pytest.param(pair, marks=[] if pair in QUICK_PAIRS else pytest.mark.slow) for pair in PAIRS])
def test_pairs_of_differing_inputs(digits_folder, tmp_path, pair):
    run, configs = start_run(digits_folder, tmp_path, pair, *PAIRS[pair])
    wrapper, source = run.pair, loader_config(configs)
    same_size = configs['a']['input_size'] == configs['b']['input_size']
    assert configs['a'] != configs['b'] and len(wrapper.inputs) == 1
    [transformed] = wrapper.inputs
    assert source is configs['b' if transformed == 'a' else 'a']
    assert {key.partition('.')[0] for key in wrapper.state_dict()} <= {'model_a', 'model_b', 'affine'}

    # Two updates, after which BatchNorm in evaluation normalises as in training.
    for module in wrapper.modules():
        if hasattr(module, 'momentum'):
            module.momentum = 0.9
    before = {key: parameter.clone() for key, parameter in wrapper.named_parameters()}
    train_one_epoch(run)
    terms = epoch_terms(run)
    assert {'train_loss', 'train_ce_a_loss', 'train_ce_b_loss'} <= terms.keys() and run.task.num_updates == 2
    assert all(math.isfinite(value) for value in terms.values() if value != '')
    for side in SIDES:
        moved = []
        for key, parameter in wrapper.branch(side).named_parameters():
            assert torch.isfinite(parameter).all(), key
            moved.append(not torch.equal(parameter, before[f'model_{side}.{key}']))
        assert sum(moved) > 0.9 * len(moved)
    assert_sees_own_images(run, digits_folder, configs)

    # From the images of the other branch, as in training.
    given, images = own_images(digits_folder, source), own_images(digits_folder, configs[transformed])
    config, model = configs[transformed], bare_model(run, transformed, configs)
    with torch.inference_mode():
        prepared, want = wrapper.images(transformed, given), model(images)
        got = wrapper(given)[SIDES.index(transformed)]
        unprepared = model(F.interpolate(given, config['input_size'][1:], mode='bicubic', antialias=True))
    assert prepared.shape == images.shape
    if same_size:
        assert_close(prepared, images, rtol=0, atol=1e-5)
        assert_close(got, want, rtol=1e-4, atol=1e-4)
    else:  # resized twice, from 32 pixels to the larger size and on to the smaller, rather than once
        levels = 255 * (pixels(prepared, config) - pixels(images, config)).abs()
        assert levels.max() < 8 and levels.mean() < 1
        assert (got - want).norm() < 0.03 * want.norm()
    # Guards the comparison: without its own statistics it says something else.
    assert (unprepared - want).norm() > 10 * (got - want).norm()


@pytest.mark.parametrize('interpolation', ['bicubic', 'bilinear'])
@pytest.mark.parametrize('size', [64, 40])
def test_noise_is_resized_as_by_pillow(size, interpolation):
    # Fine structure, which a resize without antialiasing would pick single pixels of.
    # Grey enough for the interpolation to end nowhere beyond black and white, where Pillow cuts.
    noise = torch.randint(80, 176, (96, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(noise.numpy())
    source = {**IMAGENET, 'input_size': (3, 96, 96), 'interpolation': 'bicubic', 'crop_pct': 1.}
    target = {
        'mean': (0.5,) * 3, 'std': (0.25,) * 3, 'input_size': (3, size, size), 'interpolation': interpolation,
        'crop_pct': 1.}
    given, own = (create_transform(**config, is_training=False)(image)[None] for config in (source, target))
    prepared = InputTransform(source, target)(given)
    assert_close(pixels(prepared, target), pixels(own, target), rtol=0, atol=1.5 / 255)


@pytest.mark.parametrize('options', [
    [*SIZES, *OTHER_B],
    ['--img-size', '48', '--crop-pct-a', '0.8', '--interpolation-b', 'bilinear', *OTHER_B],
], ids=['a smaller', 'other crop and interpolation'])
def test_validation_is_timms_own_of_each_branch(digits_folder, options):
    parsed, configs = parse(digits_folder, SMALL_PAIR, *options, '-vb', '5')
    loader = create_eval_loaders(parsed.loader, create_split(parsed.data, 'validation', 3), configs, Processes(CPU))
    assert isinstance(loader, PairEvalLoader) and len(loader) == 4
    batches, targets = zip(*loader, strict=True)
    for side in SIDES:
        assert torch.equal(torch.cat([batch[side] for batch in batches]), own_images(digits_folder, configs[side]))
    assert [f'class{i}' for i in torch.cat(targets)] == [path.parent.name for path in image_paths(digits_folder)]


@pytest.mark.parametrize('options', [[], OTHER_B + OTHER_A], ids=len)
def test_equal_inputs_cost_nothing(digits_folder, tmp_path, options):
    run, configs = start_run(digits_folder, tmp_path, SMALL_PAIR, '--img-size', '32', *options)
    assert configs['a'] == configs['b'] and len(run.pair.inputs) == 0
    assert not isinstance(run.loader_eval, PairEvalLoader) and isinstance(eval_batch(run), torch.Tensor)
    images = own_images(digits_folder, configs['a'])
    assert all(run.pair.images(side, images) is images for side in 'ab')
    # Another crop alone is one of validation, where each branch has its own images anyway.
    other, _ = start_run(
        digits_folder, tmp_path, SMALL_PAIR, '--img-size', '32', *options, '--crop-pct-b', '0.7')
    assert len(other.pair.inputs) == 0 and isinstance(other.loader_eval, PairEvalLoader)


def test_one_decode_an_image_in_training(digits_folder, tmp_path, monkeypatch):
    run, _ = start_run(digits_folder, tmp_path, SMALL_PAIR, '--img-size-a', '24', '--img-size-b', '32')
    decoded = []
    open_image = Image.open
    monkeypatch.setattr(Image, 'open', lambda file: decoded.append(file) or open_image(file))
    train_one_epoch(run)
    assert len(decoded) == 40


# other numbers of channels, copies, types


@pytest.mark.parametrize('options', [
    ['--in-chans', '1', *OTHER_B],
    ['--in-chans', '4', *RGBA, '--mean-a', '.1', '.2', '.3', '.4', '--std-a', '.4', '.3', '.2', '.1'],
    ['--input-size', '1', '32', '32', *OTHER_A],
], ids=lambda options: '-'.join(options[:2] + options[-1:]))
def test_channels(digits_folder, tmp_path, options):
    run, configs = start_run(
        digits_folder, tmp_path, SMALL_PAIR, '--img-size', '32', *options)
    channels = 4 if '4' in options else 1
    for config in configs.values():
        assert config['input_size'] == (channels, 32, 32) and len(config['mean']) == len(config['std']) == channels
    train_one_epoch(run)
    assert math.isfinite(epoch_terms(run)['train_loss'])
    [transformed] = run.pair.inputs
    source, images = (own_images(digits_folder, config) for config in (loader_config(configs), configs[transformed]))
    assert_close(run.pair.images(transformed, source), images, rtol=0, atol=1e-5)
    assert_sees_own_images(run, digits_folder, configs)


def test_copies_keep_the_transform(digits_folder, tmp_path):
    run, configs = start_run(
        digits_folder, tmp_path, SMALL_PAIR, '--img-size-a', '24', '--img-size-b', '32', *OTHER_A)
    train_one_epoch(run)
    averaged = run.task.get_trainable_module(ema=True).module
    given, own = (own_images(digits_folder, configs[side]) for side in 'ba')
    prepared = run.pair.images('a', given)
    for other in (copy.deepcopy(run.task).trainable_module, averaged):
        assert other.inputs['a'] is not run.pair.inputs['a'] and list(other.inputs) == ['a']
        assert torch.equal(other.images('a', given), prepared)
    with torch.inference_mode():
        model = bare_model(run, 'a', configs, ema=True)
        assert torch.equal(averaged.eval()({'a': own, 'b': given}).logits_a, model(own))
        assert torch.equal(averaged(given).logits_a, model(prepared))
        assert torch.equal(averaged.alone('a')(given)[0], model(prepared))
        assert torch.equal(averaged.alone('b')(given)[0], averaged.model_b(given))
    # A checkpoint of a pair without a transform fits, and the other way round.
    state = copy.deepcopy(averaged).state_dict()
    run.pair.set_inputs(configs['a'], dict.fromkeys(SIDES, configs['a']))
    assert len(run.pair.inputs) == 0
    run.pair.load_state_dict(state)
    averaged.load_state_dict(run.pair.state_dict())


@pytest.mark.parametrize(('dtype', 'size'), [(torch.float64, 48), (torch.bfloat16, 32), (torch.bfloat16, 48)])
def test_other_types(digits_folder, tmp_path, dtype, size):
    run, configs = start_run(
        digits_folder, tmp_path, SMALL_PAIR, '--img-size-a', size, '--img-size-b', '32', *OTHER_B)
    given = own_images(digits_folder, configs['a'])
    want = run.pair.images('b', given)
    pair = run.pair.to(dtype)
    prepared = pair.images('b', given.to(dtype))
    assert_close(prepared, want.to(dtype), rtol=0, atol=1e-6 if dtype == torch.float64 else 0.05)
    assert pair(given.to(dtype)).logits_b.dtype == dtype


# configurations of pretrained models


def save_pretrained(folder, **data_config):
    """Write a small transformer of a fixed size for 7 classes as timm exports it, with this data configuration."""
    torch.manual_seed(0)
    model = timm.create_model(
        'deit_tiny_patch16_224', num_classes=7, img_size=48, embed_dim=48, depth=2, num_heads=3)
    assert not model.dynamic_img_size
    save_for_hf(model, str(folder), data_config={**resolve_model_data_config(model), **data_config})
    return model


OWN = {
    'input_size': (3, 48, 48), 'mean': (0.5, 0.4, 0.3), 'std': (0.5, 0.6, 0.7), 'interpolation': 'bilinear',
    'crop_pct': 0.95}


def test_configuration_of_a_pretrained_branch(digits_folder, tmp_path):
    save_pretrained(tmp_path / 'vit', **OWN)
    options = ['--img-size-a', '64', '--crop-pct', '1.0']

    def configs(*more):
        argv = ['--model-a', 'test_resnet', '--model-b', f'local-dir:{tmp_path / "vit"}', '--img-size-a', '64']
        return resolve_data(parse_args([str(digits_folder), *argv, '--device', 'cpu', *more]))

    def differing(config, **wanted):
        return {key: config[key] for key in wanted if config[key] != wanted[key]}

    for found in (configs('--pretrained-b'), configs()):  # with its weights and without
        assert not differing(found['b'], **OWN)
        assert not differing(
            found['a'], **HALF, input_size=(3, 64, 64), interpolation='bilinear', crop_pct=0.95)  # test_resnet's
    # What is given wins.
    found = configs('--pretrained', '--mean', '0.1', '--std-b', '0.9', '--img-size-b', '32', '--crop-pct-b', '0.8')
    assert not differing(
        found['b'], mean=(0.1,) * 3, std=(0.9,) * 3, input_size=(3, 32, 32), crop_pct=0.8, interpolation='bilinear')
    assert not differing(found['a'], mean=(0.1,) * 3, input_size=(3, 64, 64))
    # A model that timm knows by name, without its weights: its size alone.
    _, found = parse(digits_folder, SMALL_PAIR, *options)
    assert found['b']['input_size'] == (3, 160, 160) and loader_config(found) is found['b']
    _, found = parse(digits_folder, f'test_resnet + local-dir:{tmp_path / "vit"}', *options)
    assert loader_config(found) is found['a']


def test_pretrained_branch_trains_and_validates_on_its_own_images(digits_folder, tmp_path):
    model = save_pretrained(tmp_path / 'vit', **OWN)
    run, configs = start_run(
        digits_folder, tmp_path, f'test_resnet + local-dir:{tmp_path / "vit"}', '--img-size-a', '64', '--pretrained-b')
    state = {key: tensor for key, tensor in run.pair.model_b.state_dict().items() if not key.startswith('head.')}
    assert run.pair.model_b.num_classes == 4
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in state.items())
    train_one_epoch(run)
    assert_sees_own_images(run, digits_folder, configs)
    # And at another size.
    parsed, configs = parse(
        digits_folder, f'test_resnet + local-dir:{tmp_path / "vit"}', '--img-size-b', '64', '--pretrained-b')
    assert configs['b'] == {**configs['b'], 'input_size': (3, 64, 64), 'mean': OWN['mean'], 'std': OWN['std']}
    wanted = timm.create_model(f'local-dir:{tmp_path / "vit"}', pretrained=True, num_classes=4, img_size=64)
    assert torch.equal(create_branch(parsed, 'b', configs['b'], 4).pos_embed, wanted.pos_embed)


# a whole run


def test_run_and_exports_validate_each_branch_on_its_own_images(digits_folder, tmp_path):
    folder = run(
        digits_folder, tmp_path, '--img-size-a', '24', *OTHER_B, '--epochs', '1', '--export', '--crop-pct', '1.0')
    [summary] = rows(folder)

    def validate(*argv):
        path = tmp_path / 'results.json'
        argv = ['validate', *map(str, argv), '--device', 'cpu', '--workers', '0', '--results-file', str(path)]
        assert main(argv) == 0
        return json.loads(path.read_text())

    def assert_same_figures(row, side, weights):
        prefix = 'eval_ema' if weights == 'ema' else 'eval'
        for metric in ('top1', 'top5', 'loss'):
            assert row[metric] == pytest.approx(float(summary[f'{prefix}_{metric}_{side}']), rel=1e-6)

    found = validate(folder / 'last.pth.tar', digits_folder, '-b', '8')
    assert [(row['branch'], row['weights'], row['img_size']) for row in found] == [
        ('a', 'raw', 24), ('a', 'ema', 24), ('b', 'raw', 32), ('b', 'ema', 32)]
    for row in found:
        assert_same_figures(row, row['branch'], row['weights'])
    for side, name, size, mean, std in (('a', 'test_resnet', 24, 0.5, 0.5), ('b', 'test_vit', 32, 0.4, 0.3)):
        config = json.loads((folder / 'export' / f'vpl-{name}' / 'config.json').read_text())['pretrained_cfg']
        assert config['input_size'] == [3, size, size] and config['crop_pct'] == 1.0
        assert (config['mean'], config['std']) == ([mean] * 3, [std] * 3)
        [row] = validate(folder / 'export' / f'vpl-{name}', digits_folder)
        assert row['images'] == 17 and row['img_size'] == size
        assert_same_figures(row, side, 'ema')
