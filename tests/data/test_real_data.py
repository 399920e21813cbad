"""Runs on natural images, where TIMM_VPL_DATA names the folder that holds them."""
import tarfile
from collections import Counter

import pytest
from runs import rows, torchrun

from timm_vpl.cli import train

MODELS = ['--model-a', 'test_convnext', '--model-b', 'test_vit']  # without BatchNorm: equal for any process count
OPTIONS = [
    '--img-size', '32', '--val-split', 'test', '--epochs', '3', '--warmup-epochs', '1', '--opt', 'sgd', '--lr', '0.05',
    '--aa', 'rand-m5-n1', '--reprob', '0', '--workers', '1', '--device', 'cpu', '--no-model-ema',
    '--checkpoint-hist', '1', '--interpolation', 'bicubic', '--std', '0.25']


@pytest.fixture(scope='session')
def cifar10(data_root, tmp_path_factory):
    """A folder with the first 64 (train) and 15 (test) images of each class of CIFAR-10 (JPEG copy)."""
    root = tmp_path_factory.mktemp('cifar10')
    counts, wanted = Counter(), {'train': 64, 'test': 15}
    with tarfile.open(data_root / 'cifar10_jpeg_full.tar.gz') as tar:
        for member in tar:
            parts = member.name.removeprefix('./').split('/')
            if member.isfile() and len(parts) == 3 and counts[tuple(parts[:2])] < wanted[parts[0]]:
                counts[tuple(parts[:2])] += 1
                path = root.joinpath(*parts)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(tar.extractfile(member).read())
    assert len(counts) == 20
    return root


def test_a_pair_learns_cifar10_on_one_process_as_on_two(cifar10, tmp_path):
    options = [*MODELS, *OPTIONS, '--output', str(tmp_path)]
    assert train([str(cifar10), *options, '-b', '32', '--experiment', 'one']) == 0
    torchrun(2, cifar10, *options, '-b', '16', '--experiment', 'two')
    one, two = rows(tmp_path / 'one'), rows(tmp_path / 'two')
    assert float(one[-1]['train_ce_a_loss']) < float(one[0]['train_ce_a_loss']) - 0.01
    assert [row['stage'] for row in one] == ['1', '2', '2']
    for name in ('train_loss', 'train_ce_a_loss', 'train_ce_b_loss', 'train_contrastive_loss', 'eval_loss_a'):
        assert float(two[-1][name]) == pytest.approx(float(one[-1][name]), rel=1e-4), name
