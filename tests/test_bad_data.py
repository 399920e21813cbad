"""Bad data, with real files, real loaders and real workers: what is skipped and counted, and what is refused."""
import io
import itertools
import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import load_results, run_ranks, run_script
from timm.data import ImageDataset
from timm.data.readers.reader import Reader
from torch.utils.data import DataLoader, IterableDataset

from timm_vpl.data.data import (
    MAX_WARNINGS,
    DigitsReader,
    ReadableImages,
    Replaced,
    TrainLoader,
    check_labels,
    class_names,
    create_eval_loader,
    create_eval_loaders,
    create_split,
    create_train_loader,
    data_errors,
    read,
    resolve_classes,
    skipped_images,
    split_card,
)
from timm_vpl.engine.device import init_device
from timm_vpl.engine.evaluate import evaluate
from timm_vpl.errors import RunError, UsageError
from timm_vpl.options.options import parse_args

CPU = torch.device('cpu')
MODELS = ['--model-a', 'test_resnet', '--model-b', 'test_vit', '--img-size', '32', '--device', 'cpu', '-b', '8']
CONFIG = {
    'input_size': (3, 32, 32), 'interpolation': 'bilinear', 'mean': (0.5,) * 3, 'std': (0.5,) * 3, 'crop_pct': 1.,
    'crop_mode': 'center'}


def options(folder, *argv):
    args = parse_args([*MODELS, '-j', '0', *map(str, argv), str(folder)])
    init_device(args)
    return args


def split(folder, *argv, name='train'):
    return create_split(options(folder, *argv), name, is_training=name == 'train')


def train_loader(folder, *argv):
    args = options(folder, *argv)
    dataset = create_split(args, 'train', is_training=True)
    resolve_classes(args, dataset, dataset)
    return create_train_loader(args, dataset, CONFIG, CPU)


def eval_loader(folder, workers=0):
    args = options(folder, '-j', workers)
    return create_eval_loader(args, create_split(args, 'validation', is_training=False), CONFIG, CPU)


@pytest.fixture(autouse=True)
def end_workers():
    """End the workers of loaders that a caught exception keeps, for which torch would wait."""
    yield
    for worker in multiprocessing.active_children():
        worker.terminate()
        worker.join()


@pytest.fixture
def folder(digits_folder, tmp_path):
    return shutil.copytree(digits_folder, tmp_path / 'data')


def encoded(image, kind, **kwargs):
    stream = io.BytesIO()
    image.save(stream, kind, **kwargs)
    return stream.getvalue()


def noise(mode='RGB', size=(32, 32)):
    shape = (size[1], size[0], len(mode))
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), mode=mode)


def bomb():
    """A PNG that claims 400 million pixels."""
    header = b'IHDR' + (20000).to_bytes(4, 'big') * 2 + PNG[24:29]
    return PNG[:12] + header + zlib.crc32(header).to_bytes(4, 'big') + PNG[33:]


PNG, JPEG = encoded(noise(), 'PNG'), encoded(noise(), 'JPEG')
BROKEN = {
    'empty': b'',
    'text': b'<html>404 Not Found</html>',
    'truncated JPEG': JPEG[:len(JPEG) // 2],
    'JPEG header alone': JPEG[:30],
    'truncated PNG': PNG[:len(PNG) // 2],
    'damaged PNG': PNG[:60] + bytes(20) + PNG[80:],
    'bomb': bomb(),
    'floats': encoded(Image.fromarray(np.ones((4, 4), dtype=np.float32)), 'TIFF'),
}


@pytest.mark.parametrize('what', BROKEN)
def test_the_next_image_stands_in_for_one_that_is_broken(folder, caplog, what):
    bad = folder / 'train' / 'class1' / '0000.png'
    bad.write_bytes(BROKEN[what])
    dataset = split(folder)
    index = dataset.filenames().index('class1/0000.png')
    image, label = dataset[index]
    following, own_label = dataset[index + 1]
    assert image.tobytes() == following.tobytes() and (label, own_label) == (1, 1)
    assert isinstance(label, Replaced) and not isinstance(own_label, Replaced)
    assert [record.getMessage().split(': ')[0] for record in caplog.records] == [
        f'Skipped sample class1/0000.png (index {index})']


class Failing(Reader):
    """Digits, one of which fails by an error of the reader's own."""

    def __init__(self, error):
        super().__init__()
        self.digits, self.error = DigitsReader('validation'), error

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 5:
            raise self.error
        return self.digits[index]

    def _filename(self, index, basename=False, absolute=False):
        return f'digit {index}'


@pytest.mark.parametrize('error, cause', [
    (MemoryError(), 'MemoryError'), (RuntimeError('out of\ndescriptors'), 'RuntimeError out of'),
    (AttributeError('no x'), 'AttributeError no x'), (KeyError('label'), "no 'label' among the columns"),
])
def test_no_image_stands_in_where_the_fault_is_not_of_an_image(error, cause, caplog):
    dataset = ReadableImages(ImageDataset('', reader=Failing(error)), 'L')
    assert dataset[4][1] == int(dataset.reader[4][1])
    with pytest.raises(RunError, match=f'^data: digit 5 .index 5.: {cause}'):
        dataset[5]
    assert not caplog.records


def test_memory_that_runs_out_in_decoding_makes_no_image_stand_in(folder, monkeypatch):
    def load(*args):
        raise MemoryError
    monkeypatch.setattr(Image.Image, 'convert', load)
    with pytest.raises(RunError, match='the memory ran out'):
        split(folder)[0]


def test_links_to_nothing_and_to_themselves_are_skipped(folder):
    (folder / 'train' / 'class1' / '0000.png').symlink_to(folder / 'gone.png')
    (folder / 'train' / 'class1' / '0001.png').symlink_to(folder / 'train' / 'class1' / '0001.png')
    dataset = split(folder)
    index = dataset.filenames().index('class1/0000.png')
    assert isinstance(dataset[index][1], Replaced) and not isinstance(dataset[index + 2][1], Replaced)


def test_warnings_end_but_not_the_skipping(folder, caplog):
    (folder / 'train' / 'class1' / '0000.png').write_bytes(b'')
    dataset = split(folder)
    index = dataset.filenames().index('class1/0000.png')
    assert all(isinstance(dataset[index][1], Replaced) for _ in range(MAX_WARNINGS + 5))
    assert len(caplog.records) == MAX_WARNINGS
    assert caplog.records[-1].getMessage().endswith('further ones are only counted')


@pytest.mark.parametrize('dataset', ['', 'torch/folder'])
def test_kinds_of_images_among_the_others(folder, dataset):
    grey = (np.arange(16, dtype=np.uint16) * 4096).reshape(4, 4)
    files = {
        '0gif.png': encoded(Image.new('P', (4, 4), 0).convert('RGB').quantize(2), 'GIF'),
        '0cmyk.png': encoded(Image.new('CMYK', (4, 4), (0, 255, 255, 0)), 'JPEG', quality=100),
        '0grey16.png': encoded(Image.fromarray(grey), 'PNG'),
        '0alpha.png': encoded(Image.new('RGBA', (4, 4), (1, 2, 3, 0)), 'PNG'),
        '0bits.png': encoded(Image.new('1', (4, 4), 1), 'PNG'),
    }
    for name, content in files.items():
        (folder / 'train' / 'class0' / name).write_bytes(content)
    images = split(folder, *(['--dataset', dataset] if dataset else []))
    names = [os.path.basename(path) for path, _ in (images.samples if dataset else images.reader.samples)]
    pixels = {}
    for name in files:
        image, label = images[names.index(name)]
        assert image.mode == 'RGB' and label == 0 and not isinstance(label, Replaced)
        pixels[name] = np.asarray(image)
    assert pixels['0gif.png'].max() == 0 and pixels['0bits.png'].min() == 255
    assert np.abs(pixels['0cmyk.png'].astype(int) - [255, 0, 0]).max() < 4
    assert (pixels['0grey16.png'] == (grey >> 8)[..., None]).all()  # Pillow alone: 255 but for the first
    assert (pixels['0alpha.png'] == [1, 2, 3]).all()


def test_images_that_timm_does_not_read_are_named(folder, caplog):
    (folder / 'train' / 'class0' / 'a.gif').write_bytes(encoded(noise(), 'GIF'))
    (folder / 'train' / 'class0' / 'README.txt').write_text('')
    assert len(split(folder)) == 40
    assert '40 images, 4 classes of 9 (class1) to 11 (class0); not read: 1 .gif, 1 .txt; --input-key' in caplog.text
    caplog.clear()
    assert len(split(folder, '--input-key', '.png;.gif')) == 41
    assert 'not read: 1 .txt' in caplog.text and '--input-key' not in caplog.text


def test_a_data_set_can_be_pickled(folder):
    dataset = split(folder)
    again = pickle.loads(pickle.dumps(dataset))
    assert again.filenames() == dataset.filenames() and again[3][0].tobytes() == dataset[3][0].tobytes()
    assert not hasattr(again, 'nothing') and not hasattr(again, '__getitems__')


@pytest.fixture
def damaged(folder):
    """A training set with 3 broken files of 40, and the same one with the next files' content in their place."""
    whole = shutil.copytree(folder, folder.parent / 'whole')
    names = split(folder).filenames()
    for index in (4, 5, 17):
        (folder / 'train' / names[index]).write_bytes(b'')
    for index in (5, 4, 17):
        shutil.copy(whole / 'train' / names[index + 1], whole / 'train' / names[index])
    return folder, whole


def run_epochs(loader, *starts):
    batches, counts = [], []
    for epoch, first_batch in starts:
        for _, input, target, _ in loader.epoch(epoch, first_batch):
            batches.append((input, target))
            counts.append(loader.skipped)
    return batches, counts


def test_skipped_images_are_counted_by_batch_and_draw_for_their_place(damaged):
    folder, whole = damaged
    argv = ['--aa', 'rand-m5-n1', '--reprob', '0.5', '--mixup', '0.2']
    starts = [(0, 0), (1, 0), (1, 3)]
    expected, none = run_epochs(train_loader(whole, *argv), *starts)
    assert set(none) == {0}
    broken = {4, 5, 17}
    for workers in (0, 2):
        loader = train_loader(folder, *argv, '-j', workers)
        counts = []
        for epoch, first_batch in starts:
            loader.sampler.set_epoch(epoch)
            per_batch = [len(broken & set(loader.sampler.sample_ids(batch).tolist())) for batch in range(5)]
            counts += itertools.accumulate(per_batch[first_batch:])
        batches, found = run_epochs(loader, *starts)
        assert found == counts and counts[4] == counts[9] == 3
        assert all(torch.equal(a, b) for one, other in zip(batches, expected, strict=True)
                   for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize('workers', [0, 2])
def test_validation_counts_what_a_pass_skips(folder, workers):
    (folder / 'validation' / 'class1' / '0000.png').write_bytes(b'')
    loader = eval_loader(folder, workers)
    for _ in range(2):
        assert sum(len(target) for _, target in read(loader)) == 18 and skipped_images(loader) == 1
    args = options(folder, '-j', workers)
    dataset = create_split(args, 'validation', is_training=False)
    pair = create_eval_loaders(args, dataset, {'a': CONFIG, 'b': {**CONFIG, 'interpolation': 'bicubic'}}, CPU)
    assert len(list(read(pair))) == 3 and skipped_images(pair) == 1


@pytest.mark.parametrize('workers', [0, 2])
def test_too_many_in_a_row_end_a_run(folder, workers):
    for path in (folder / 'train').rglob('*.png'):
        path.write_bytes(b'none')
    with pytest.raises(RunError) as caught:
        list(train_loader(folder, '-j', workers).epoch(0))
    message = str(caught.value)
    assert message.startswith('data: Failed to load 10 consecutive samples, the last class') and '\n' not in message
    assert '.png (index ' in message and message.endswith('no image that Pillow knows')


@pytest.mark.parametrize('workers', [0, 2])
def test_labels_beyond_the_classes_are_refused(folder, workers):
    args = options(folder, '-j', workers)
    dataset = create_split(args, 'validation', is_training=False)
    check_labels(dataset, 3)
    with pytest.raises(RunError) as caught:
        list(read(create_eval_loader(args, dataset, CONFIG, CPU)))
    first = next(name for name in dataset.filenames() if name.startswith('class3'))
    index = dataset.filenames().index(first)
    assert str(caught.value) == (
        f'data: {first} (index {index}) has the label 3, none of the 3 classes, 0 to 2')


class Labels(Reader):
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


@pytest.mark.parametrize('label', [None, -1, -100, 4, 2.5, float('nan'), [1, 2], '1', np.array([0, 1])])
def test_labels_that_are_no_class(label):
    dataset = ReadableImages(ImageDataset('', reader=Labels(label)), 'RGB')
    check_labels(dataset, 4)
    with pytest.raises(RunError, match='index 0 has the label .*none of the 4 classes, 0 to 3'):
        dataset[0]


def test_labels_that_are_one():
    labels = [0, np.int64(3), 2., True, torch.tensor(1)]
    dataset = ReadableImages(ImageDataset('', reader=Labels(*labels)), 'RGB')
    check_labels(dataset, 4)
    assert [label for _, label in (dataset[i] for i in range(5))] == [0, 3, 2, 1, 1]
    dataset.target_transform = [3, 2, 7].__getitem__
    assert dataset[0][1] == 3
    for index in (1, 2):  # beyond the map, beyond the classes
        with pytest.raises(RunError, match=f'index {index} has the label'):
            dataset[index]


def test_what_is_wrong_with_the_options_is_not_skipped():
    dataset = ReadableImages(ImageDataset('', reader=Labels(KeyError('photo'), TypeError('null image'), 1)), 'RGB')
    with pytest.raises(RunError, match="no 'photo' among the columns"):
        dataset[0]
    assert isinstance(dataset[1][1], Replaced)
    dataset.transform = lambda image: image.nothing
    with pytest.raises(AttributeError):
        dataset[2]


@pytest.fixture
def loader(folder):
    return train_loader(folder, '-j', 2)


@pytest.mark.parametrize(('number', 'message'), [
    (signal.SIGKILL, 'is killed by signal: Killed. (probably the memory ran out'),
    (signal.SIGBUS, 'is killed by signal: Bus error.'),
])
def test_a_worker_that_dies_is_reported(loader, number, message):
    batches = loader.epoch(0)
    next(batches)
    with pytest.raises(RunError) as caught, data_errors():  # torch raises it at any place of the main process
        os.kill(multiprocessing.active_children()[0].pid, number)
        time.sleep(5)
    assert message in str(caught.value) and '\n' not in str(caught.value)


def test_a_worker_that_dies_while_it_is_awaited(loader):
    batches = loader.epoch(0)
    next(batches)
    pid = multiprocessing.active_children()[0].pid
    os.kill(pid, signal.SIGSTOP)
    with subprocess.Popen(['sh', '-c', f'sleep 0.5; kill -KILL {pid}']), pytest.raises(RunError, match='Killed'):
        list(batches)
        list(loader.epoch(1))


def test_other_errors_stay_what_they_are():
    for error in (RuntimeError('out of resource: shared memory'), OSError('No space left on device'), RuntimeError()):
        with pytest.raises(type(error)) as caught, data_errors():
            raise error
        assert caught.value is error


def test_workers_outlive_signals_that_are_not_for_them(loader):
    batches = loader.epoch(0)
    next(batches)
    workers = multiprocessing.active_children()
    for name in ('INT', 'TERM', 'USR1'):
        subprocess.run(['kill', f'-{name}', *(str(worker.pid) for worker in workers)], check=True)
    time.sleep(0.3)
    assert len(list(batches)) == 4 and len(list(loader.epoch(1))) == 5
    assert all(worker.is_alive() for worker in workers)
    workers[0].terminate()  # by the main process
    workers[0].join(3)
    assert workers[0].exitcode == 0


def test_workers_end_with_their_loader(folder):
    loader = train_loader(folder, '-j', 2, '--reprob', '0.5')
    list(loader.epoch(0))
    assert len(multiprocessing.active_children()) == 2
    del loader  # at once: it is in no cycle of references
    assert not multiprocessing.active_children()


EXIT = """
import os, signal, subprocess, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, signal.SIG_IGN)
from test_bad_data import eval_loader, read, train_loader
loaders = [train_loader(sys.argv[1], '-j', '2'), eval_loader(sys.argv[1], 2)]
batches = [loaders[0].epoch(0), read(loaders[1])]
for each in batches:
    next(each)
for name in ('INT', 'TERM', 'USR1'):
    subprocess.run(['kill', f'-{name}', '--', f'-{os.getpgrp()}'], check=True)
print(sum(len(list(each)) for each in batches), flush=True)
next(loaders[0].epoch(1))
if sys.argv[2] == 'error':
    raise ValueError('ends with workers at work')
"""


@pytest.mark.parametrize('end', ['return', 'error'])
def test_a_process_with_workers_ends(folder, end):
    environ = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    result = subprocess.run(
        [sys.executable, '-c', EXIT, str(folder), end], env=environ, capture_output=True, text=True, timeout=60,
        start_new_session=True)
    assert result.stdout == '6\n' and result.returncode == (end == 'error'), result.stderr
    assert 'DataLoader worker' not in result.stderr


def test_a_folder_that_holds_itself_is_refused(folder):
    (folder / 'train' / 'more').symlink_to(folder / 'validation' / 'class0')  # another folder is fine
    split(folder)
    for target in (folder / 'train' / 'class0', folder / 'train', folder):
        link = folder / 'train' / 'class0' / 'again'
        link.symlink_to(target)
        with pytest.raises(UsageError, match='is a link to a folder that it lies in; remove it') as caught:
            split(folder)
        assert str(link) in str(caught.value)
        link.unlink()


def test_an_empty_class_is_refused(folder):
    (folder / 'train' / 'class9').mkdir()
    (folder / 'train' / 'class9' / 'notes.txt').write_text('')
    with pytest.raises(UsageError, match='class9 holds no image'):
        split(folder)


def pack(folder):
    """Pack the training split into a tar, and return the options that read it."""
    with tarfile.open(folder / 'train.tar', 'w') as tar:
        tar.add(folder / 'train', arcname='.')
    return ['--train-split', 'train.tar']


@pytest.mark.parametrize('tar', [False, True])
def test_what_is_hidden_or_lies_loose_is_no_class(folder, caplog, tar):
    train = folder / 'train'
    before = list(zip(split(folder).filenames(), split(folder).reader.targets, strict=True))
    shutil.copytree(train / 'class0', train / '.ipynb_checkpoints')
    shutil.copytree(train / 'class0', train / 'class1' / '.ipynb_checkpoints')
    image = next((train / 'class0').iterdir())
    shutil.copy(image, train / 'class1' / '._0000.png')
    shutil.copy(image, train / '0.png')
    options = pack(folder) if tar else []
    caplog.clear()
    dataset = split(folder, *options, name='train.tar' if tar else 'train')
    found = [(os.path.normpath(name), int(target)) for name, target in zip(
        dataset.filenames(), dataset.reader.targets, strict=True)]
    assert found == before and class_names(dataset) == ['class0', 'class1', 'class2', 'class3']
    hidden = 23 if tar else 3  # a folder that is not entered counts once
    assert caplog.records[-1].levelno == logging.WARNING and caplog.records[-1].getMessage().endswith(
        f'not read: {hidden} hidden (a name that begins with a dot), 1 outside the class folders')


@pytest.mark.parametrize('tar', [False, True])
def test_nested_folders(folder, caplog, tar):
    train = folder / 'train'
    name = 'train.tar' if tar else 'train'

    def read_split():
        return split(folder, *(pack(folder) if tar else []), name=name)

    (train / 'digits').mkdir()
    for label in range(4):
        (train / f'class{label}').rename(train / 'digits' / f'class{label}')
    assert class_names(read_split()) == ['class0', 'class1', 'class2', 'class3'] and not caplog.records

    shutil.copytree(train / 'digits' / 'class3', train / 'more' / 'class3')  # of another source
    assert class_names(read_split()) == ['class0', 'class1', 'class2', 'class3']
    assert '1 classes are each of several folders of one name: class3 in digits/class3, more/class3' in caplog.text

    shutil.copytree(train / 'more' / 'class3', train / 'digits' / 'class0' / 'new')
    with pytest.raises(UsageError, match='the folder digits/class0/new would be a class beside digits/class0'):
        read_split()
    (folder / 'map.txt').write_text('class0\nclass1\nclass2\nclass3\nnew\n')
    options = [*(pack(folder) if tar else []), '--class-map', 'map.txt']  # of the data's folder
    assert class_names(split(folder, *options, name=name)) == ['class0', 'class1', 'class2', 'class3', 'new']

    for label in range(4):
        shutil.rmtree(train / 'more', ignore_errors=True)
        shutil.rmtree(train / 'digits' / 'class0' / 'new', ignore_errors=True)
        (train / f'class{label}').mkdir()
        (train / 'digits' / f'class{label}').rename(train / f'class{label}' / 'images')
    shutil.rmtree(train / 'digits')
    with pytest.raises(UsageError, match='its 4 folders with images have one name, so that all would be one class'):
        read_split()


def test_loose_images_alone_are_refused(folder):
    for path in (folder / 'train').rglob('*.png'):
        path.rename(folder / 'train' / f'{path.parent.name}-{path.name}')
    with pytest.raises(UsageError, match="Found 0 images .* not read: {'outside the class folders': 40}"):
        split(folder)


def test_a_hidden_class_of_torchvision_is_refused(folder):
    shutil.copytree(folder / 'train' / 'class0', folder / 'train' / '.ipynb_checkpoints')
    with pytest.raises(UsageError, match='a hidden folder .ipynb_checkpoints, which is no class'):
        split(folder, '--dataset', 'torch/folder')


@pytest.mark.parametrize('tar', [False, True])
def test_a_class_map_that_misses_folders_is_refused(folder, tar):
    (folder / 'map.txt').write_text('class3\nclass1\n')
    options, name = (pack(folder), 'train.tar') if tar else ([], 'train')
    with pytest.raises(UsageError) as caught:
        split(folder, *options, '--class-map', folder / 'map.txt', name=name)
    assert str(caught.value).startswith(f'--class-map {folder}/map.txt: misses 2 of the 4 folders with images in ')
    assert '(class0, class2)' in str(caught.value)
    for start in ('', '\ufeff'):  # some editors begin a file with a mark
        (folder / 'map.txt').write_text(f'{start}class3\nclass1\nother\nclass0\nclass2\n', encoding='utf-8')
        dataset = split(folder, *options, '--class-map', folder / 'map.txt', name=name)
        assert class_names(dataset) == ['class3', 'class1', 'other', 'class0', 'class2']
        assert len(dataset) == 40 and split_card(dataset)['classes']['other'] == 0
        assert [int(target) for target in dataset.reader.targets] == [
            [3, 1, 4, 0][int(os.path.normpath(path)[5])] for path in dataset.filenames()]


def test_torchvision_takes_no_class_map(folder):
    (folder / 'map.txt').write_text('class3\nclass2\nclass1\nclass0\n')
    with pytest.raises(UsageError, match='torchvision numbers the classes of torch/folder itself'):
        split(folder, '--dataset', 'torch/folder', '--class-map', folder / 'map.txt')


def test_keys_that_mean_nothing_are_refused(folder):
    with pytest.raises(UsageError, match='--target-key label: has no meaning for'):
        split(folder, '--target-key', 'label')
    with pytest.raises(UsageError, match='--input-key .png: has no meaning for'):
        split(folder, *pack(folder), '--input-key', '.png', name='train.tar')


def test_card_of_a_split(folder):
    (folder / 'train' / 'class0' / 'a.gif').write_bytes(b'')
    counts = {'class0': 11, 'class1': 9, 'class2': 10, 'class3': 10}
    card = {'images': 40, 'classes': counts, 'not_read': {'.gif': 1}}
    assert split_card(split(folder)) == card
    assert split_card(split(folder, '--dataset', 'torch/folder')) == {**card, 'not_read': {}}
    assert split_card(split(folder, *pack(folder), name='train.tar')) == {**card, 'not_read': {}}
    loader = create_train_loader(options(folder), split(folder), CONFIG, CPU)
    assert split_card(loader.dataset) == card
    digits = split_card(create_split(parse_args([*MODELS, '--dataset', 'digits']), 'validation', is_training=False))
    assert digits == {
        'images': 360, 'classes': dict(zip('0123456789', [35, 36, 35, 37, 37, 37, 37, 36, 33, 37], strict=True)),
        'not_read': {}}


@pytest.mark.parametrize(('name', 'content', 'message'), [
    ('a.pkl', b'', 'Ran out of input'),
    ('a.pkl', b'no pickle', ''),
    ('a.pkl', pickle.dumps({'class0': 0})[:-5], ''),
    ('a.pkl', pickle.dumps(os.getcwd), 'is not permitted in a class map file'),
    ('a.pkl', pickle.dumps(['class0']), 'expected a dict'),
    ('a.pkl', pickle.dumps({}), 'not a class index for each name'),
    ('a.pkl', pickle.dumps({'class0': '0'}), 'not a class index for each name'),
    ('a.pkl', pickle.dumps({'class0': -1}), 'not a class index for each name'),
    ('a.txt', b'class0\n\nclass1\n', 'a line without a name'),
    ('a.txt', b'class0\nclass0\nclass1\n', 'a name twice'),
    ('a.txt', b'\xff\xfe\x00', "can't decode byte"),
    ('a.csv', b'class0,0\n', 'Unsupported class map file extension'),
])
def test_a_damaged_class_map_is_refused(folder, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError) as caught:
        split(folder, '--class-map', tmp_path / name)
    text = str(caught.value)
    assert text.startswith(f'--class-map {tmp_path / name}: ') and message in text and '\n' not in text


def test_a_tar_member_without_bytes_is_skipped(folder, caplog):
    (folder / 'train' / 'class1' / '0000.png').write_bytes(b'')
    with tarfile.open(folder / 'train.tar', 'w') as tar:
        tar.add(folder / 'train', arcname='.')
    dataset = split(folder, '--train-split', 'train.tar', name='train.tar')
    replaced = [name for i, name in enumerate(dataset.filenames()) if isinstance(dataset[i][1], Replaced)]
    assert replaced == ['./class1/0000.png'] and 'Skipped sample ./class1/0000.png' in caplog.text


@pytest.mark.parametrize('damage', [lambda content: content[:len(content) // 2 + 100], lambda content: b'no tar'])
def test_a_damaged_tar_is_refused(folder, damage):
    with tarfile.open(folder / 'train.tar', 'w') as tar:
        tar.add(folder / 'train', arcname='.')
    (folder / 'train.tar').write_bytes(damage((folder / 'train.tar').read_bytes()))
    with pytest.raises(UsageError, match="--data-dir .*: split 'train.tar' could not be read: "):
        split(folder, '--train-split', 'train.tar', name='train.tar')


# Streams


class Stream(IterableDataset):
    """A stream of pictures with labels."""

    def __init__(self, labels):
        self.labels = labels
        self.transform = self.target_transform = None

    def __iter__(self):
        for label in self.labels:
            image = torch.zeros(3, 4, 4, dtype=torch.uint8)
            yield image, label if self.target_transform is None else self.target_transform(label)

    def __len__(self):
        return len(self.labels)


def stream_loader(labels, *argv):
    args = options('.', *argv)
    dataset = Stream(labels)
    check_labels(dataset, 4)
    return create_train_loader(args, dataset, CONFIG, CPU)


@pytest.mark.parametrize('workers', [0, 1])
def test_labels_of_a_stream(workers):
    loader = stream_loader([*range(4)] * 4, '-j', workers)
    assert len(list(loader.epoch(0))) == 2 and loader.skipped == 0
    with pytest.raises(RunError) as caught:
        list(stream_loader([0] * 15 + [4], '-j', workers).epoch(0))
    assert str(caught.value) == 'data: a sample of the stream has the label 4, none of the 4 classes, 0 to 3'


class PaddedReader:
    """A reader like those of timm's streams: each process has as many images, whatever the stream has."""

    def __init__(self, num_samples):
        self.num_samples = num_samples


def padded_stream(num_samples):
    stream = Stream([0] * 6)  # of each of 2 processes
    stream.reader = PaddedReader(num_samples)
    loader, first = DataLoader(stream, batch_size=4), torch.eye(4)[:1]
    try:
        return evaluate(lambda images: {'a': first.expand(len(images), 4)}, ['a'], loader, CPU, distributed=True)['a']
    except (RunError, SystemExit) as e:
        return str(e)


def streams_of_two(rank, world):
    return unequal_streams(rank, world), padded_stream(12), padded_stream(11), padded_stream(None)


def unequal_streams(rank, world):
    args = parse_args(['--model-a', 'test_resnet', '--model-b', 'test_vit', '.'])
    args.rank, args.world_size = rank, world
    loader = TrainLoader(DataLoader(Stream([0] * 8 * (3 + 2 * rank)), batch_size=8), args, CPU)
    return [[batch for batch, *_ in loader.epoch(epoch)] for epoch in range(2)]


def test_streams_end_together_and_are_counted(tmp_path):
    log = run_script(__file__, tmp_path)
    first, second = load_results(tmp_path, 2)
    for ends, whole, *_ in (first, second):
        assert ends == [[0, 1, 2]] * 2 and whole['images'] == 12 and whole['top1'] == 100., log
    assert '2 processes validated 12 images of a stream that has 11: ' in first[2]
    assert 'validate with one process' in first[2] and 'that has an unknown number: ' in first[3]
    assert second[2:] == ('1', '1')  # one process speaks


if __name__ == '__main__':
    logging.disable()
    run_ranks(Path(sys.argv[1]), 2, streams_of_two)
