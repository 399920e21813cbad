"""The command on real data: a run of tars, and what it refuses with one line."""
import shutil

import numpy as np
import pytest
import torch
import yaml
from loading import MODELS, pack
from PIL import Image
from runs import error_line
from timm.data import create_transform
from timm.data.auto_augment import NAME_TO_OP

from timm_vpl.cli import train
from timm_vpl.compat import guard_posterize
from timm_vpl.data.sources import DigitsReader
from timm_vpl.engine.checkpoint import read_checkpoint


@pytest.mark.parametrize('policy', ['v0', 'v0r', 'original', 'originalr', '3a', 'rand-m9-mstd0.5-inc1', 'rand-m2'])
def test_policies_pass_over_real_images(policy):
    # 0.1 % to 6 % of images met Pillow 13's refusal of 0 bits.
    guard_posterize()
    transform = create_transform(32, is_training=True, auto_augment=policy, use_prefetcher=True)
    reader = DigitsReader('train')
    for i in range(400):
        image = Image.open(reader[i][0]).convert('RGB').resize((32, 32))
        assert transform(image).shape == (3, 32, 32)


def test_posterize_to_0_bits_is_black():
    guard_posterize()
    image = Image.new('RGB', (4, 4), (200, 100, 50))
    assert np.asarray(NAME_TO_OP['Posterize'](image, 0)).max() == 0
    assert np.asarray(NAME_TO_OP['Posterize'](image, 1))[0, 0].tolist() == [128, 0, 0]
    assert NAME_TO_OP['Posterize'](image, 8) is image


def test_a_run_of_tars_with_a_class_map_and_a_broken_image(folder, tmp_path, caplog):
    (folder / 'train' / 'class0' / 'broken.png').write_bytes(b'not an image')
    for split in ('train', 'validation'):
        for name in ('class1', 'class3'):
            shutil.rmtree(folder / split / name)
    (tmp_path / 'classes.txt').write_text('class2\nclass0\n')
    argv = [*pack(folder, 'train', 'validation'), '--val-split', 'validation.tar']
    options = ['-b', '8', '--epochs', '1', '--output', tmp_path, '--experiment', 'map', '--no-model-ema', '-j', '0']
    assert train([*MODELS, str(folder), *argv, *map(str, options), '--class-map', str(tmp_path / 'classes.txt')]) == 0
    assert 'Skipped sample ./class0/broken.png' in caplog.text
    args = read_checkpoint(str(tmp_path / 'map' / 'last.pth.tar'))['args']
    assert (args['num_classes'], args['class_names']) == (2, ['class2', 'class0'])
    data = yaml.safe_load((tmp_path / 'map' / 'data.yaml').read_text())
    card = data['contents']['train']
    assert card == {'images': 22, 'classes': {'class2': 10, 'class0': 12}, 'not_read': {}}
    assert list(card['classes']) == data['train']['classes'] == ['class2', 'class0']


def of_images(change):
    """A change of all training images."""
    return lambda folder: [change(path) for path in (folder / 'train').rglob('*.png')]


def loose(path):
    path.rename(path.parents[1] / f'{path.parent.name}-{path.name}')


def checkpoint(**content):
    return lambda folder: torch.save(content, folder / 'last.pth.tar')


def bad_checkpoint(content):
    return lambda folder: (folder / 'last.pth.tar').write_bytes(content)


RESUME = ['-b', 8, '--resume', '{}/last.pth.tar']
WEIGHTS = {'state_dict': {'model_a.weight': torch.zeros(1)}, 'epoch': 0, 'optimizer': {}}
# How the data or a checkpoint is spoilt, options, what is said, status; command lines alone: command_lines.yaml.
REFUSED = {
    'no folder': (shutil.rmtree, [], '{}', 2),
    'empty class': (lambda folder: (folder / 'train' / 'class9').mkdir(), [], 'class9 contains no images', 2),
    'other classes': (lambda folder: shutil.rmtree(folder / 'validation' / 'class2'), [],
                      "4 classes in 'train' and 3 in 'validation'", 2),
    'no split': (lambda folder: (folder / 'validation').rename(folder / 'test'), [],
                 '--val-split validation: no such folder or tar in {}, which has test, train', 2),
    'one tar': (pack, ['--data-dir', '{}/train.tar'], 'one tar for all splits', 2),
    'no images': (of_images(lambda path: path.unlink()), [], 'no images in the folders', 2),
    'loose images': (of_images(loose), [], "no images in the folders of {}/train; not read: {{'outside", 2),
    'no image is one': (
        of_images(lambda path: path.write_bytes(b'no')), ['-b', 8], 'Failed to load 10 consecutive samples', 1),
    **{f'{content[:6]}': (bad_checkpoint(content), RESUME, '{}/last.pth.tar', 1) for content in (
        b'', b'no checkpoint at all', b'PK\x03\x04 cut off')},
    'of other models': (checkpoint(**WEIGHTS), RESUME, 'does not fit this pair', 1),
    'weights alone': (checkpoint(state_dict={}), RESUME, 'no epoch and no optimizer', 1),
}


@pytest.mark.parametrize('case', REFUSED)
def test_what_is_refused(capsys, folder, tmp_path, case):
    spoil, options, message, status = REFUSED[case]
    spoil(folder)
    argv = [str(option).format(folder) for option in options]
    place = [] if '--data-dir' in argv else [folder]
    line = error_line(
        capsys, *MODELS, '-j', '0', *place, '--output', tmp_path / 'out', *argv, statuses=[status])
    assert message.format(folder) in line
    assert case == 'no image is one' or not (tmp_path / 'out').exists()
