"""The data pipeline: order, seeding, the embedded digits, policies, and what is refused."""
import json
import os
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from timm.data import create_transform
from timm.utils.misc import natural_key
from torch.utils.data import Dataset

from timm_vpl.cli import train
from timm_vpl.data.data import (
    DigitsReader,
    Place,
    SeededDataset,
    SeededErasing,
    SeededSampler,
    _guard_posterize,
    class_names,
    create_split,
    create_train_loader,
)
from timm_vpl.engine.checkpoint import read_checkpoint
from timm_vpl.options.options import parse_args

MODELS = ['--model-a', 'test_resnet', '--model-b', 'test_vit', '--img-size', '32', '--device', 'cpu', '-j', '0']


def test_digits():
    train_split, held_out = DigitsReader('train'), DigitsReader('validation')
    assert (len(train_split), len(held_out)) == (1437, 360)
    counts = np.bincount(np.concatenate([train_split.labels, held_out.labels]))
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # as scikit-learn documents them
    file, label = train_split[0]
    image = np.asarray(Image.open(file))
    assert label == 0 and image.shape == (8, 8) and image.max() <= 240
    assert image[0].tolist() == [0, 0, 75, 195, 135, 15, 0, 0]  # first row of the first digit: 0 0 5 13 9 1 0 0
    dataset = create_split(parse_args([*MODELS, '--dataset', 'digits']), 'validation', is_training=False)
    assert dataset[3][0].mode == 'RGB' and class_names(dataset) == [str(i) for i in range(10)]


def global_batches(world_size, batch_size, epoch=3, **kwargs):
    samplers = [
        SeededSampler(50, batch_size, seed=1, rank=rank, world_size=world_size, **kwargs)
        for rank in range(world_size)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    places = [list(sampler) for sampler in samplers]
    assert {len(share) for share in places} == {len(samplers[0])}
    steps = len(samplers[0]) // batch_size
    return [
        sorted(place for share in places for place in share[step * batch_size:(step + 1) * batch_size])
        for step in range(steps)]


def test_a_global_batch_is_the_same_for_any_number_of_processes():
    assert global_batches(1, 12) == global_batches(2, 6) == global_batches(3, 4) == global_batches(4, 3)
    indices, other = (
        [place.index for batch in global_batches(2, 6, epoch=epoch) for place in batch] for epoch in (3, 4))
    assert indices != other
    assert len(set(indices)) == len(indices) == 48  # whole batches of the 50, none twice


def test_repeated_augmentation_copies_lie_together_and_draw_differently():
    for batch in global_batches(2, 6, repeats=3):
        indices = [place.index for place in sorted(batch, key=lambda place: place.position)]
        assert all(len(set(indices[i:i + 3])) == 1 for i in range(0, 12, 3))
        assert len({place.position for place in batch}) == 12
    sampler = SeededSampler(50, 6, seed=1, repeats=1.5)
    places = list(sampler)
    assert sampler.sample_ids(2).tolist() == [place.index for place in places[12:18]]
    assert max(np.bincount([place.index for place in places])) == 2


def test_an_epoch_entered_later_goes_on_where_it_would_be():
    sampler = SeededSampler(50, 6, seed=1)
    sampler.set_epoch(2)
    whole = list(sampler)
    sampler.set_epoch(2, first_batch=3)
    assert list(sampler) == whole[18:] and len(sampler) == 48


class Draws(Dataset):
    """What is drawn where an image would be."""

    def __getitem__(self, index):
        return float(torch.rand(())), index


def test_draws_are_those_of_a_place():
    dataset = SeededDataset(Draws(), seed=1)
    drawn = {(epoch, position): dataset[Place(epoch, position, 5)][0] for epoch in (0, 1) for position in (0, 1)}
    assert len(set(drawn.values())) == 4 and dataset[Place(1, 0, 6)][0] == drawn[1, 0]
    assert SeededDataset(Draws(), seed=2)[Place(0, 0, 5)][0] not in drawn.values()

    def erased(epoch, batch, count, rank=0):
        erasing = SeededErasing(lambda input: float(torch.rand(())), 1, rank, torch.device('cpu'))
        erasing.place = (epoch, batch)
        return [erasing(None) for _ in range(count)]
    whole = erased(0, 0, 3)
    assert erased(0, 1, 2) == whole[1:]
    assert len({*whole, *erased(1, 0, 3), *erased(0, 0, 3, rank=1)}) == 9


@pytest.mark.parametrize('policy', ['v0', 'v0r', 'original', 'originalr', '3a', 'rand-m9-mstd0.5-inc1', 'rand-m2'])
def test_policies_pass_over_real_images(policy):
    # 0.1 % to 6 % of images met Pillow 13's refusal of 0 bits.
    _guard_posterize()
    transform = create_transform(32, is_training=True, auto_augment=policy, use_prefetcher=True)
    reader = DigitsReader('train')
    for i in range(400):
        image = Image.open(reader[i][0]).convert('RGB').resize((32, 32))
        assert transform(image).shape == (3, 32, 32)


def test_posterize_to_0_bits_is_black():
    from timm.data.auto_augment import NAME_TO_OP
    _guard_posterize()
    image = Image.new('RGB', (4, 4), (200, 100, 50))
    assert np.asarray(NAME_TO_OP['Posterize'](image, 0)).max() == 0
    assert np.asarray(NAME_TO_OP['Posterize'](image, 1))[0, 0].tolist() == [128, 0, 0]
    assert NAME_TO_OP['Posterize'](image, 8) is image


def refused(capsys, *argv, status=2):
    """Return the one line with which a command ends, after its log."""
    try:
        code = train([*MODELS, *map(str, argv)])
    except SystemExit as e:
        code = e.code
    written = capsys.readouterr().err.strip()
    errors = [line for line in written.splitlines() if line.startswith('train_vpl.py: error: ')]
    assert code == status and len(errors) == 1 and written.endswith(errors[0]) and 'Traceback' not in written, written
    return errors[0]


@pytest.fixture
def folder(digits_folder, tmp_path):
    return shutil.copytree(digits_folder, tmp_path / 'data')


def test_missing_data_folder(capsys, tmp_path):
    assert str(tmp_path / 'none') in refused(capsys, tmp_path / 'none')


def test_empty_class_folder(capsys, folder):
    (folder / 'train' / 'class9').mkdir()
    assert 'class9 holds no image' in refused(capsys, folder)


def test_class_map(folder, tmp_path):
    class_map = tmp_path / 'classes.txt'
    class_map.write_text('class2\nclass0\n')
    for split in ('train', 'validation'):
        for name in ('class1', 'class3'):
            shutil.rmtree(folder / split / name)
    options = ['-b', '8', '--epochs', '1', '--output', str(tmp_path / 'out'), '--experiment', 'map', '--no-model-ema']
    assert train([*MODELS, str(folder), '--class-map', str(class_map), *options]) == 0
    args = read_checkpoint(str(tmp_path / 'out' / 'map' / 'last.pth.tar'))['args']
    assert (args['num_classes'], args['class_names']) == (2, ['class2', 'class0'])
    with open(tmp_path / 'out' / 'map' / 'data.yaml') as f:
        data = yaml.safe_load(f)
    card = data['contents']['train']
    assert card == {'images': 21, 'classes': {'class2': 10, 'class0': 11}, 'not_read': {}}
    assert list(card['classes']) == data['train']['classes'] == ['class2', 'class0']


# Names of classes in their order. timm's key does not tell some apart: it sorts a set, in the order of the hash seed.
TIED = ['01', '1', '9', '10', 'A', 'a', 'Ab2', 'aB02', 'B', 'b', 'x1', 'x-1']


def print_classes(folder):
    """Print the classes and labels of a folder and a tar."""
    for split in ('train', 'train.tar'):
        dataset = create_split(parse_args([*MODELS, str(folder)]), split, is_training=True)
        print(json.dumps([class_names(dataset), sorted(int(dataset[i][1]) for i in range(len(dataset)))]))


@pytest.fixture
def tied(folder):
    """A folder and a tar of classes whose names tie, each with one image more than the one before."""
    image = next((folder / 'train').rglob('*.png')).read_bytes()
    shutil.rmtree(folder / 'train')
    for i, name in enumerate(TIED):
        (folder / 'train' / name).mkdir(parents=True)
        for j in range(i + 1):
            (folder / 'train' / name / f'{j}.png').write_bytes(image)
    with tarfile.open(folder / 'train.tar', 'w') as tar:
        tar.add(folder / 'train', arcname='.')
    return folder


def check_classes(printed):
    for line in printed.splitlines():
        names, targets = json.loads(line)
        assert names == TIED and np.bincount(targets).tolist() == list(range(1, len(TIED) + 1))
    assert len(printed.splitlines()) == 2


def test_class_order_is_total(tied, capsys):
    assert [natural_key(name) for name in TIED] == sorted(natural_key(name) for name in TIED)  # timm's
    print_classes(tied)
    check_classes(capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(3))
def test_class_order_does_not_hang_on_the_hash_seed(tied, seed):
    code = f'import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); import test_data; test_data.print_classes'
    result = subprocess.run(
        [sys.executable, '-c', f'{code}({str(tied)!r})'], env={**os.environ, 'PYTHONHASHSEED': str(seed)}, check=True,
        capture_output=True, text=True)
    check_classes(result.stdout)


def test_mixup_ends_with_its_epoch(folder):
    args = parse_args([*MODELS, str(folder), '-b', '8', '--mixup', '0.8', '--smoothing', '0', '--mixup-off-epoch', '1'])
    args.num_classes, args.rank, args.world_size = 4, 0, 1
    config = {'input_size': (3, 32, 32), 'interpolation': 'bilinear', 'mean': (0.5,) * 3, 'std': (0.5,) * 3}
    dataset = create_split(args, 'train', is_training=True)
    loader = create_train_loader(args, dataset, config, torch.device('cpu'))
    hard = {epoch: [bool((target.max(dim=1).values == 1).all()) for _, _, target, _ in loader.epoch(epoch)]
            for epoch in (0, 1)}
    assert not all(hard[0]) and len(hard[1]) == 5 and all(hard[1])


def test_images_are_in_timms_order(folder):
    from timm.data import create_dataset
    args = parse_args([*MODELS, str(folder)])
    for split in ('train', 'validation'):
        wanted = create_dataset('', str(folder), split=split)
        assert create_split(args, split, is_training=False).reader.samples == wanted.reader.samples


def test_splits_of_different_classes(capsys, folder):
    shutil.rmtree(folder / 'validation' / 'class2')
    error = refused(capsys, folder)
    assert "4 classes in 'train' and 3 in 'validation'" in error and 'class2' in error


def test_missing_split(capsys, folder):
    (folder / 'validation').rename(folder / 'test')
    error = refused(capsys, folder)
    assert '--val-split validation' in error and 'test, train' in error


def test_tars(capsys, folder, tmp_path):
    for split in ('train', 'validation'):
        with tarfile.open(folder / f'{split}.tar', 'w') as tar:
            tar.add(folder / split, arcname='.')
    options = ['-b', '8', '--epochs', '1', '--output', str(tmp_path / 'out'), '--no-model-ema', '-j', '1']
    splits = ['--train-split', 'train.tar', '--val-split', 'validation.tar']
    assert train([*MODELS, str(folder), *options, *splits, '--experiment', 'tar']) == 0
    assert read_checkpoint(str(tmp_path / 'out' / 'tar' / 'last.pth.tar'))['args']['num_classes'] == 4
    assert 'one tar for all splits' in refused(capsys, folder / 'train.tar', *options)


def test_folder_without_images(capsys, folder):
    for path in (folder / 'train').rglob('*.png'):
        path.unlink()
    assert 'Found 0 images' in refused(capsys, folder)


def test_class_count(capsys, folder):
    assert '--num-classes 3: the data has 4 classes' in refused(capsys, folder, '--num-classes', 3)


def test_batch_larger_than_the_data(capsys, folder):
    assert '--batch-size 64' in refused(capsys, folder, '-b', 64)


def test_batch_size_1_with_batch_norm(capsys, folder):
    assert 'BatchNorm' in refused(capsys, folder, '-b', 1)


def test_unknown_policy(capsys, folder):
    assert '--aa v9' in refused(capsys, folder, '--aa', 'v9')


def test_model_that_can_not_take_the_size(capsys, folder):
    assert '--model-b test_vit' in refused(capsys, folder, '--img-size', 8)


def test_unknown_model_argument(capsys, folder):
    assert 'bogus' in refused(capsys, folder, '--model-kwargs-a', 'bogus=1')


def test_unknown_eval_metric(capsys, folder):
    assert 'expected one of top1, loss_a' in refused(capsys, folder, '--eval-metric', 'top9', '-b', 8)


def test_sync_bn_needs_a_gpu(capsys, folder):
    assert 'CUDA devices only' in refused(capsys, folder, '--sync-bn', '-b', 1)


def test_channels_without_a_mode(capsys, folder):
    assert 'name another --input-img-mode' in refused(capsys, folder, '--in-chans', 4)


@pytest.mark.parametrize('content', [b'', b'no checkpoint at all', b'PK\x03\x04 cut off'])
def test_unreadable_checkpoint(capsys, folder, tmp_path, content):
    path = tmp_path / 'bad.pth.tar'
    path.write_bytes(content)
    error = refused(capsys, folder, '--resume', path, '-b', 8, '--output', tmp_path / 'out', status=1)
    assert str(path) in error


def test_checkpoint_of_other_models(capsys, folder, tmp_path):
    path = tmp_path / 'other.pth.tar'
    torch.save({'state_dict': {'model_a.weight': torch.zeros(1)}, 'epoch': 0, 'optimizer': {}}, path)
    error = refused(capsys, folder, '--resume', path, '-b', 8, '--output', tmp_path / 'out', status=1)
    assert 'does not fit this pair' in error


def test_weights_alone_do_not_resume(capsys, folder, tmp_path):
    path = tmp_path / 'cleaned.pth.tar'
    torch.save({'state_dict': {}}, path)
    error = refused(capsys, folder, '--resume', path, '-b', 8, '--output', tmp_path / 'out', status=1)
    assert 'no epoch and no optimizer' in error and not (tmp_path / 'out').exists()


def test_images_that_can_not_be_decoded_are_skipped(folder, tmp_path, caplog):
    (folder / 'train' / 'class1' / 'broken.png').write_bytes(b'not an image')
    options = ['-b', '8', '--epochs', '1', '--output', str(tmp_path / 'out'), '--no-model-ema']
    assert train([*MODELS, str(folder), *options]) == 0
    assert 'Skipped sample' in caplog.text and 'broken.png' in caplog.text


def test_no_image_can_be_decoded(capsys, folder, tmp_path):
    for path in (folder / 'train').rglob('*.png'):
        path.write_bytes(b'not an image')
    error = refused(capsys, folder, '-b', 8, '--output', tmp_path / 'out', status=1)
    assert 'Failed to load 10 consecutive samples' in error


@pytest.mark.parametrize(('options', 'message'), [
    (['--sched', 'wsd', '--epochs', '5', '--warmup-epochs', '8'], '--sched wsd'),
    (['--opt', 'nosuch'], '--opt nosuch'),
    (['--torchcompile', 'nobackend'], '--torchcompile nobackend: expected one of'),
    (['--model-a', 'local-dir:/tmp'], '--model-a local-dir:/tmp'),
    (['--train-split', 'validation'], 'validates on training images'),
])
def test_what_timm_does_not_take(capsys, folder, options, message):
    assert message in refused(capsys, folder, '-b', 8, *options)
