"""What the tests of the data room share: options, splits, loaders, files."""
import io
import tarfile

import numpy as np
import torch
from PIL import Image

from timm_vpl.data.loaders import create_eval_loader, create_train_loader
from timm_vpl.data.splits import create_split, resolve_classes
from timm_vpl.engine.device import init_device
from timm_vpl.options.options import parse_args

CPU = torch.device('cpu')
MODELS = ['--model-a', 'test_resnet', '--model-b', 'test_vit', '--img-size', '32', '--device', 'cpu']
CONFIG = {
    'input_size': (3, 32, 32), 'interpolation': 'bilinear', 'mean': (0.5, 0.4, 0.3), 'std': (0.5, 0.2, 0.3),
    'crop_pct': 1., 'crop_mode': 'center'}


def options(*argv):
    args = parse_args([*MODELS, '-b', '8', '-j', '0', *map(str, argv)])
    init_device(args)
    return args


def split(*argv, name='train'):
    """A split, by default that of training."""
    return create_split(options(*argv), name, is_training=name == 'train')


def train_loader(*argv):
    args = options(*argv)
    dataset = create_split(args, 'train', is_training=True)
    args.num_classes, _ = resolve_classes(args, dataset, dataset)
    return create_train_loader(args, dataset, CONFIG, CPU)


def eval_loader(*argv):
    args = options(*argv)
    return create_eval_loader(args, create_split(args, 'validation', is_training=False), CONFIG, CPU)


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
