"""Branches with images of their own size and statistics: from one decode, equal to the models alone."""
import copy

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform
from timm.models import save_for_hf

from timm_vpl import PairTask, build
from timm_vpl.data import DigitsReader, PairEvalLoader, create_eval_loaders, create_split
from timm_vpl.inputs import InputTransform
from timm_vpl.options import parse_args

CPU = torch.device('cpu')
HALF = ['--mean-b', '0.5', '--std-b', '0.5']

# Twelve pairs across families; the first three in the default suite.
PAIRS = [
    ('test_resnet', 'test_vit', ['--img-size-a', '48', '--img-size-b', '64', *HALF]),
    ('convnext_atto', 'deit_tiny_distilled_patch16_224',
     ['--img-size-a', '64', '--img-size-b', '48', '--model-kwargs-b', 'depth=1', *HALF]),
    ('test_efficientnet', 'test_vit', ['--img-size', '64', '--in-chans', '1', '--mean-b', '0.3', '--std-b', '0.4']),
    ('regnetx_002', 'vit_tiny_patch16_224',
     ['--img-size-a', '64', '--img-size-b', '96', '--model-kwargs-b', 'depth=2']),
    ('resnet10t', 'swin_tiny_patch4_window7_224', [
        '--img-size-a', '64', '--img-size-b', '56', '--model-kwargs-b', 'embed_dim=24', 'depths=(1,1,2,1)',
        'num_heads=(1,2,2,2)', *HALF]),
    ('efficientnet_lite0', 'pit_ti_224', ['--img-size-a', '96', '--img-size-b', '80', *HALF]),
    ('mobilenetv4_conv_small_050', 'xcit_nano_12_p16_224', ['--img-size-a', '96', '--img-size-b', '64']),
    ('resnet18', 'eva02_tiny_patch14_224', ['--img-size-a', '64', '--img-size-b', '56', *HALF]),
    ('resnetv2_18', 'coatnet_pico_rw_224', ['--img-size-a', '48', '--img-size-b', '64', *HALF]),
    ('dla46_c', 'levit_128s', ['--img-size-a', '64', '--img-size-b', '224', *HALF]),
    ('repvgg_a0', 'cait_xxs24_224', ['--img-size-a', '64', '--img-size-b', '48', '--model-kwargs-b', 'depth=2', *HALF]),
    ('test_convnext', 'vit_tiny_patch16_224', [
        '--img-size-a', '32', '--img-size-b', '48', '--model-kwargs-b', 'depth=2', 'global_pool=avg',
        'class_token=False', *HALF]),
]
each_pair = pytest.mark.parametrize('name_a, name_b, options', [
    pytest.param(*pair, id='+'.join(pair[:2]), marks=() if i < 3 else pytest.mark.slow)
    for i, pair in enumerate(PAIRS)])


def create(name_a, name_b, *options):
    """Return the options, the configurations and the pair that a run would have."""
    args = parse_args([
        '--dataset', 'digits', '--model-a', name_a, '--model-b', name_b, '--batch-size', '4', '--workers', '0',
        '--crop-pct', '1.0', '--device', 'cpu', *options])
    args.num_classes, args.world_size, args.rank, args.distributed = 10, 1, 0, False
    configs = build.resolve_data(args)
    return args, configs, build.create_pair(args, configs, CPU)


def digits(count, in_chans):
    reader = DigitsReader('validation')
    return [Image.open(reader[i][0]).convert('L' if in_chans == 1 else 'RGB').resize((100, 100)) for i in range(count)]


def prepare(images, config):
    transform = create_transform(**config, is_training=False)
    return torch.stack([transform(image) for image in images])


@each_pair
def test_pairs_across_families(name_a, name_b, options):
    args, configs, pair = create(name_a, name_b, *options)
    shared = build.loader_config(configs)
    images = digits(4, shared['input_size'][0])
    input, target = prepare(images, shared), torch.tensor([3, 1, 4, 1])
    own = {side: prepare(images, configs[side]) for side in 'ab'}

    # What a branch makes of the shared images is what timm's transform makes of the decoded one.
    for side in 'ab':
        got = pair.images(side, input)
        assert got.shape == own[side].shape
        same_size = configs[side]['input_size'] == shared['input_size']
        error = (got - own[side]).abs()
        # Normalised anew: rounding. Resized from a resized image: interpolation, a few grey levels of 255.
        assert error.max() < 1e-5 if same_size else (error * max(configs[side]['std'])).mean() * 255 < 12
        if configs[side] == shared:
            assert got is input

    pair.eval()
    with torch.inference_mode():
        output, exact = pair(input), pair(own)
        for side, logits, alone in (('a', output.logits_a, exact.logits_a), ('b', output.logits_b, exact.logits_b)):
            bare = pair.branch(side)(own[side])
            assert torch.equal(alone, bare)
            if configs[side]['input_size'] == shared['input_size']:
                torch.testing.assert_close(logits, bare, rtol=1e-4, atol=1e-4)

    # Two real steps.
    task = PairTask(pair, build.create_criterion(args, 2, CPU), verbose=False)
    optimizer = build.create_optimizer(args, pair, build.learning_rates(args))
    before = {name: parameter.clone() for name, parameter in pair.named_parameters()}
    task.train()
    for epoch in (0, 1):
        task.set_epoch(epoch)
        loss = task(input, target)['loss']
        assert loss.isfinite()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    moved = {name.partition('.')[0] for name, parameter in pair.named_parameters()
             if not torch.equal(parameter, before[name])}
    assert {'model_a', 'model_b'} <= moved


def test_equal_inputs_cost_nothing():
    args, configs, pair = create('test_resnet', 'test_vit', '--img-size', '32')
    assert len(pair.inputs) == 0 and configs['a'] == configs['b']
    loader = create_eval_loaders(args, create_split(args, 'validation', is_training=False), configs, CPU)
    assert not isinstance(loader, PairEvalLoader)
    input = torch.randn(2, 3, 32, 32)
    assert pair.images('a', input) is input and pair.images('b', input) is input


def test_transform_is_no_state_and_follows_the_pair():
    _, _, pair = create('test_resnet', 'test_vit', '--img-size', '32', *HALF)
    assert set(pair.inputs) == {'b'} and not any(key.startswith('inputs') for key in pair.state_dict())
    other = copy.deepcopy(pair)
    input = torch.randn(2, 3, 32, 32)
    assert torch.equal(other.images('b', input), pair.images('b', input))
    assert other.inputs['b'] is not pair.inputs['b']
    assert pair.double().images('b', input.double()).dtype == torch.float64


def test_validation_prepares_images_for_each_branch():
    args, configs, _ = create(
        'test_resnet', 'test_vit', '--img-size-a', '24', '--img-size-b', '32', '--interpolation-b', 'bilinear', *HALF)
    loader = create_eval_loaders(args, create_split(args, 'validation', is_training=False), configs, CPU)
    assert isinstance(loader, PairEvalLoader) and len(loader) == 90 and len(loader.dataset) == 360
    input, target = next(iter(loader))
    reader = DigitsReader('validation')
    images = [Image.open(reader[i][0]).convert('RGB') for i in range(4)]
    for side in 'ab':
        torch.testing.assert_close(input[side], prepare(images, configs[side]), rtol=1e-5, atol=1e-5)
    assert target.tolist() == [reader[i][1] for i in range(4)]


def test_pretrained_branch_brings_its_own_input(tmp_path):
    model = timm.create_model('test_vit', num_classes=10, img_size=48)
    save_for_hf(model, str(tmp_path), safe_serialization=True, data_config={
        'input_size': (3, 48, 48), 'mean': (0.1, 0.2, 0.3), 'std': (0.4, 0.5, 0.6), 'crop_pct': 0.8})
    _, configs, pair = create(
        'test_resnet', f'local-dir:{tmp_path}', '--pretrained-b', '--img-size-a', '32', '--crop-pct-a', '0.9')
    assert tuple(configs['b']['mean']) == (0.1, 0.2, 0.3) and configs['b']['input_size'] == (3, 48, 48)
    assert configs['a']['input_size'] == (3, 32, 32) and configs['a']['crop_pct'] == 0.9
    assert tuple(configs['a']['mean']) == timm.data.IMAGENET_DEFAULT_MEAN
    assert build.loader_config(configs) is configs['b'] and set(pair.inputs) == {'a'}
    assert torch.equal(pair.model_b.head.weight, model.head.weight)


def test_transform_of_one_statistic():
    source = {'mean': (0.5,), 'std': (0.25,), 'input_size': (1, 8, 8)}
    transform = InputTransform(source, {**source, 'mean': (0.25,), 'std': (0.5,)})
    raw = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(transform((raw - 0.5) / 0.25), (raw - 0.25) / 0.5)
    assert not InputTransform(source, dict(source))
