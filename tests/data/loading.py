"""What the tests of the data room share: options, splits, loaders, files."""
import io
import multiprocessing
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from timm_vpl.core.processes import Processes
from timm_vpl.data.loaders import create_eval_loader, create_train_loader
from timm_vpl.data.splits import create_split, resolve_classes
from timm_vpl.engine.boundary import as_line
from timm_vpl.errors import RunError
from timm_vpl.options.train import parse_args

CPU = torch.device('cpu')
MODELS = ['--model-a', 'test_resnet', '--model-b', 'test_vit', '--img-size', '32', '--device', 'cpu']
CONFIG = {
    'input_size': (3, 32, 32), 'interpolation': 'bilinear', 'mean': (0.5, 0.4, 0.3), 'std': (0.5, 0.2, 0.3),
    'crop_pct': 1., 'crop_mode': 'center'}


def options(*argv):
    return parse_args([*MODELS, '-b', '8', '-j', '0', *map(str, argv)])


def split(*argv, name='train'):
    """A split, by default that of training."""
    asked = options(*argv)
    return create_split(asked.data, name, asked.input.channels, 8, asked.run.seed, is_training=name == 'train')


def train_loader(*argv):
    asked, images = options(*argv), split(*argv)
    num_classes, _ = resolve_classes(asked, images, images)
    return create_train_loader(asked, images, CONFIG, num_classes, Processes(CPU))


def eval_loader(*argv):
    return create_eval_loader(options(*argv).loader, split(*argv, name='validation'), CONFIG, Processes(CPU))


def pack(folder, *names):
    """Pack splits into tars, by default that of training, and return the options that read it."""
    for name in names or ['train']:
        with tarfile.open(folder / f'{name}.tar', 'w') as tar:
            tar.add(folder / name, arcname='.')
    return ['--train-split', 'train.tar']


def encoded(image, kind, **kwargs):
    stream = io.BytesIO()
    image.save(stream, kind, **kwargs)
    return stream.getvalue()


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
PNG, JPEG = encoded(NOISE, 'PNG'), encoded(NOISE, 'JPEG')


def end_workers():
    """End the workers of loaders that a caught exception keeps, for which torch would wait."""
    for worker in multiprocessing.active_children():
        worker.terminate()
        worker.join()


def refusal(batches):
    """The one line with which a loader ends."""
    with pytest.raises((RuntimeError, OSError, EOFError, RunError)) as caught:
        list(batches)
    line = str(as_line(caught.value))
    end_workers()
    assert '\n' not in line
    return line
