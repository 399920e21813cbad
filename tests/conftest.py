"""Small real data for the tests: digits of the package as a folder of PNG files; larger data by TIMM_VPL_DATA."""
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

torch.set_num_threads(1)
os.environ.setdefault('OMP_NUM_THREADS', '1')  # for the processes that tests start


@pytest.fixture(scope='session')
def digits_folder(tmp_path_factory):
    """A folder with `train` (4 classes, 40 images) and `validation` (17 images) splits."""
    from timm_vpl.data.sources import DigitsReader
    root = tmp_path_factory.mktemp('digits')
    for split, count in (('train', 40), ('validation', 17)):
        reader = DigitsReader(split)
        indices = [i for i in range(len(reader)) if reader.targets[i] < 4][:count]
        for i in indices:
            file, label = reader[i]
            path = root / split / f'class{label}' / f'{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.open(file).resize((32, 32)).save(path)
    return root


@pytest.fixture(scope='session')
def timm_scripts(data_root):
    """The folder of timm's own scripts, beside that of larger data."""
    folder = data_root.parent / 'timm'
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist: no scripts of timm's")
    return folder


@pytest.fixture(scope='session')
def data_root():
    """The folder of larger real data sets, named by TIMM_VPL_DATA."""
    root = os.environ.get('TIMM_VPL_DATA')
    if not root:
        pytest.skip('TIMM_VPL_DATA is not set: no larger real data')
    return Path(root)
