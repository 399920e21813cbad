"""A short run that the tests of the tools share, and its options."""
import pytest

from timm_vpl.cli import train

OPTIONS = [
    '--model-a', 'test_resnet', '--model-b', 'test_vit', '--img-size', '32', '-b', '8', '--epochs', '3',
    '--warmup-epochs', '0', '--lr', '0.003', '--workers', '0', '--device', 'cpu', '--model-ema-decay', '0.5',
    '--mean', '0.4', '0.5', '0.6', '--std', '0.2', '--crop-pct', '0.9', '--interpolation', 'bilinear', '--seed', '3',
    '--drop-path', '0.1', '--hang-timeout', '99', '--recovery-minutes', '9', '--nonfinite-limit', '7', '--no-curves']


@pytest.fixture(scope='session')
def run_options():
    """Options of the run, the models first."""
    return OPTIONS


@pytest.fixture(scope='session')
def run_dir(digits_folder, tmp_path_factory):
    """The folder of a short training run, exported at its end; leave it as it is."""
    output = tmp_path_factory.mktemp('runs')
    assert train([str(digits_folder), *OPTIONS, '--output', str(output), '--experiment', 'run']) == 0
    return output / 'run'
