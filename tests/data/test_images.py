"""Images that can't be read, kinds of images, labels: what is replaced, and what is refused."""
import io
import os
import pickle
import zlib

import numpy as np
import pytest
import torch
from loading import JPEG, PNG, encoded, split
from PIL import Image
from timm.data.readers.reader import Reader

from timm_vpl.data.images import MAX_WARNINGS, Images
from timm_vpl.data.sources import SOURCES
from timm_vpl.errors import RunError


def bomb():
    """A PNG that claims 400 million pixels."""
    header = b'IHDR' + (20000).to_bytes(4, 'big') * 2 + PNG[24:29]
    return PNG[:12] + header + zlib.crc32(header).to_bytes(4, 'big') + PNG[33:]


BROKEN = {
    'empty': b'', 'text': b'<html>404 Not Found</html>', 'bomb': bomb(),
    'truncated JPEG': JPEG[:len(JPEG) // 2], 'JPEG header alone': JPEG[:30],
    'truncated PNG': PNG[:len(PNG) // 2], 'damaged PNG': PNG[:60] + bytes(20) + PNG[80:],
    'floats': encoded(Image.fromarray(np.ones((4, 4), dtype=np.float32)), 'TIFF'),
    'link to nothing': 'gone.png', 'link to itself': '0000.png'}


@pytest.mark.parametrize('what', BROKEN)
def test_the_next_image_stands_in_for_one_that_is_broken(folder, caplog, what):
    bad, content = folder / 'train' / 'class1' / '0000.png', BROKEN[what]
    if isinstance(content, str):
        bad.symlink_to(content)
    else:
        bad.write_bytes(content)
    dataset = split(folder)
    index = dataset.reader.filenames().index('class1/0000.png')
    image, label = dataset[index]
    following, own_label = dataset[index + 1]
    assert image.tobytes() == following.tobytes() and (label, own_label) == (1, 1)
    assert dataset.replaced.nonzero().tolist() == [[index]]
    assert [record.getMessage().split(': ')[0] for record in caplog.records] == [
        f'Skipped sample class1/0000.png (index {index})']


class Given(Reader):
    """A reader of one picture with given labels; an exception for a label is raised."""

    def __init__(self, *labels):
        super().__init__()
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        if isinstance(self.labels[index], Exception):
            raise self.labels[index]
        return io.BytesIO(PNG), self.labels[index]

    def _filename(self, index, basename=False, absolute=False):
        return f'x/{index}'


def given(*labels, **kwargs):
    return Images(Given(*labels), SOURCES[''], 'RGB', **kwargs)


@pytest.mark.parametrize('error, cause', [
    (MemoryError(), 'out of memory'),
    (RuntimeError('out of\ndescriptors'), 'RuntimeError out of'),
    (AttributeError('no x'), 'AttributeError no x'),
    (KeyError('label'), "'label' is not a column of the data, or not in --class-map"),
])
def test_no_image_stands_in_where_the_fault_is_not_of_an_image(error, cause, caplog):
    dataset = given(0, error, TypeError('null image'), 1)
    assert dataset[0][1] == 0
    with pytest.raises(RunError, match=f'^data: x/1 .index 1.: {cause}'):
        dataset[1]
    assert not caplog.records and not dataset.replaced.any()
    assert dataset[2][1] == 1 and dataset.replaced[2]
    dataset.transform = lambda image: image.nothing
    with pytest.raises(AttributeError):
        dataset[3]


def test_memory_that_runs_out_in_decoding_makes_no_image_stand_in(folder, monkeypatch):
    def load(*args):
        raise MemoryError
    monkeypatch.setattr(Image.Image, 'convert', load)
    with pytest.raises(RunError, match='out of memory'):
        split(folder)[0]


def test_warnings_end_but_not_the_skipping(caplog):
    dataset = given(OSError('no'), 3)
    assert all(dataset[0][1] == 3 for _ in range(MAX_WARNINGS + 5))
    assert len(caplog.records) == MAX_WARNINGS
    assert caplog.records[-1].getMessage().endswith('further ones are counted, but not logged')


@pytest.mark.parametrize('dataset', ['', 'torch/folder'])
def test_kinds_of_images_among_the_others(folder, dataset):
    grey = (np.arange(16, dtype=np.uint16) * 4096).reshape(4, 4)
    files = {
        '0gif.png': (encoded(Image.new('P', (4, 4), 0).convert('RGB').quantize(2), 'GIF'), 0),
        '0cmyk.png': (encoded(Image.new('CMYK', (4, 4), (0, 255, 255, 0)), 'JPEG', quality=100), [254, 0, 0]),
        '0grey16.png': (encoded(Image.fromarray(grey), 'PNG'), (grey >> 8)[..., None]),  # Pillow: 255 but for the first
        '0alpha.png': (encoded(Image.new('RGBA', (4, 4), (1, 2, 3, 0)), 'PNG'), [1, 2, 3]),
        '0bits.png': (encoded(Image.new('1', (4, 4), 1), 'PNG'), 255),
    }
    for name, (content, _) in files.items():
        (folder / 'train' / 'class0' / name).write_bytes(content)
    images = split(folder, '--dataset', dataset)
    names = [os.path.basename(name) for name in images.reader.filenames()]
    for name, (_, pixels) in files.items():
        image, label = images[names.index(name)]
        assert image.mode == 'RGB' and label == 0
        assert np.abs(np.asarray(image).astype(int) - pixels).max() <= (name == '0cmyk.png'), name
    assert not images.replaced.any()


def test_a_data_set_can_be_pickled(folder):
    dataset = split(folder)
    again = pickle.loads(pickle.dumps(dataset))
    assert again.reader.filenames() == dataset.reader.filenames() and again[3][0].tobytes() == dataset[3][0].tobytes()


@pytest.mark.parametrize('label', [None, -1, -100, 4, 2.5, float('nan'), [1, 2], '1', np.array([0, 1])])
def test_labels_that_are_no_class(label):
    with pytest.raises(RunError, match='index 0. has the label .*not one of the 4 classes, 0 to 3'):
        given(label, num_classes=4)[0]


def test_labels_that_are_one():
    labels = [0, np.int64(3), 2., True, torch.tensor(1)]
    dataset = given(*labels, num_classes=4)
    assert [dataset[i][1] for i in range(5)] == [0, 3, 2, 1, 1]
    dataset.label_map = [3, 2, 7].__getitem__
    assert dataset[0][1] == 3
    for index in (1, 2):  # beyond the map, beyond the classes
        with pytest.raises(RunError, match=f'index {index}. has the label'):
            dataset[index]


def test_a_source_is_known_to_the_options():
    from timm_vpl.options.sections import DATASET_KINDS
    assert set(SOURCES) == {'', 'digits', *DATASET_KINDS}
