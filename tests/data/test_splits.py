"""Splits: what is read of folders, tars and class maps, in which order, and what is refused."""
import logging
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from loading import encoded, pack, split
from PIL import Image
from timm.data import create_dataset
from timm.utils.misc import natural_key

from timm_vpl.data.identity import data_changes, data_identity
from timm_vpl.data.images import Images
from timm_vpl.data.sources import SOURCES, ArrayReader, DigitsReader
from timm_vpl.data.splits import class_names, split_card
from timm_vpl.errors import UsageError

CLASSES = ['class0', 'class1', 'class2', 'class3']


def test_digits():
    train_split, held_out = DigitsReader('train'), DigitsReader('validation')
    counts = np.bincount(np.concatenate([train_split.targets, held_out.targets]))
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # as scikit-learn documents them
    file, label = train_split[0]
    image = np.asarray(Image.open(file))
    assert label == 0 and image.shape == (8, 8) and image.max() <= 240
    assert image[0].tolist() == [0, 0, 75, 195, 135, 15, 0, 0]  # first row of the first digit: 0 0 5 13 9 1 0 0
    dataset = split('--dataset', 'digits', name='validation')
    assert dataset[3][0].mode == 'RGB' and split_card(dataset) == {
        'images': 360, 'classes': dict(zip('0123456789', [35, 36, 35, 37, 37, 37, 37, 36, 33, 37], strict=True)),
        'not_read': {}}
    assert len(train_split) == 1437


def test_what_is_read_of_a_folder_and_of_a_tar(folder, caplog):
    (folder / 'train' / 'class0' / 'a.gif').write_bytes(encoded(Image.new('L', (4, 4)), 'GIF'))
    (folder / 'train' / 'class0' / 'README.txt').write_text('')
    counts = dict(zip(CLASSES, [11, 9, 10, 10], strict=True))
    card = {'images': 40, 'classes': counts, 'not_read': {'.gif': 1, '.txt': 1}}
    assert split_card(split(folder)) == card
    assert '40 images, 4 classes of 9 (class1) to 11 (class0); not read: 1 .gif, 1 .txt; --input-key' in caplog.text
    caplog.clear()
    assert len(split(folder, '--input-key', '.png;.gif')) == 41
    assert 'not read: 1 .txt' in caplog.text and '--input-key' not in caplog.text
    assert split_card(split(folder, '--dataset', 'torch/folder')) == {**card, 'not_read': {}}
    assert split_card(split(folder, *pack(folder), name='train.tar')) == {**card, 'not_read': {}}
    for name in CLASSES:
        for path in sorted((folder / 'train' / name).glob('*.png'))[9:]:
            path.unlink()
    assert split_card(split(folder))['images'] == 36 and '36 images, 4 classes of 9; not read' in caplog.text


# Names of classes in their order. timm's key does not tell some apart: it sorts a set, in the order of the hash seed.
TIED = ['01', '1', '9', '10', 'A', 'a', 'Ab2', 'aB02', 'B', 'b', 'x1', 'x-1']


def test_class_order_is_total(folder):
    """A folder and a tar of classes whose names tie, each with one image more than the one before."""
    assert [natural_key(name) for name in TIED] == sorted(natural_key(name) for name in TIED)  # timm's
    image = next((folder / 'train').rglob('*.png')).read_bytes()
    shutil.rmtree(folder / 'train')
    for i, name in enumerate(TIED):
        (folder / 'train' / name).mkdir(parents=True)
        for j in range(i + 1):
            (folder / 'train' / name / f'{j}.png').write_bytes(image)
    pack(folder)
    for name in ('train', 'train.tar'):
        dataset = split(folder, name=name)
        labels = [int(dataset[i][1]) for i in range(len(dataset))]
        assert class_names(dataset) == TIED and np.bincount(labels).tolist() == list(range(1, len(TIED) + 1))


def test_images_are_in_timms_order(folder):
    for name in ('train', 'validation'):
        assert split(folder, name=name).reader.samples == create_dataset('', str(folder), split=name).reader.samples


@pytest.mark.parametrize('tar', [False, True])
def test_what_is_hidden_or_lies_loose_is_no_class(folder, caplog, tar):
    train = folder / 'train'
    before = list(zip(split(folder).reader.filenames(), split(folder).reader.targets, strict=True))
    shutil.copytree(train / 'class0', train / '.ipynb_checkpoints')
    shutil.copytree(train / 'class0', train / 'class1' / '.ipynb_checkpoints')
    image = next((train / 'class0').iterdir())
    shutil.copy(image, train / 'class1' / '._0000.png')
    shutil.copy(image, train / '0.png')
    argv = pack(folder) if tar else []
    caplog.clear()
    dataset = split(folder, *argv, name='train.tar' if tar else 'train')
    found = [(os.path.normpath(name), int(target)) for name, target in zip(
        dataset.reader.filenames(), dataset.reader.targets, strict=True)]
    assert found == before and class_names(dataset) == CLASSES
    hidden = 23 if tar else 3  # a folder that is not entered counts once
    assert caplog.records[-1].levelno == logging.WARNING and caplog.records[-1].getMessage().endswith(
        f'not read: {hidden} hidden (a name that begins with a dot), 1 outside the class folders')
    with pytest.raises(UsageError, match='a hidden folder .ipynb_checkpoints, which is not a class'):
        split(folder, '--dataset', 'torch/folder')


@pytest.mark.parametrize('tar', [False, True])
def test_nested_folders(folder, caplog, tar):
    train = folder / 'train'

    def read_split(*options):
        return split(folder, *(pack(folder) if tar else []), *options, name='train.tar' if tar else 'train')

    for label in CLASSES:
        (train / 'digits').mkdir(exist_ok=True)
        (train / label).rename(train / 'digits' / label)
    assert class_names(read_split()) == CLASSES and not caplog.records

    shutil.copytree(train / 'digits' / 'class3', train / 'more' / 'class3')  # of another source
    assert class_names(read_split()) == CLASSES
    assert '1 classes combine several folders of one name: class3 in digits/class3, more/class3' in caplog.text

    shutil.copytree(train / 'more' / 'class3', train / 'digits' / 'class0' / 'new')
    with pytest.raises(UsageError, match='the folder digits/class0/new would be a class besides digits/class0'):
        read_split()
    (folder / 'map.txt').write_text('class0\nclass1\nclass2\nclass3\nnew\n')
    assert class_names(read_split('--class-map', 'map.txt')) == [*CLASSES, 'new']  # of the data's folder

    shutil.rmtree(train / 'more')
    shutil.rmtree(train / 'digits' / 'class0' / 'new')
    for label in CLASSES:
        (train / label).mkdir()
        (train / 'digits' / label).rename(train / label / 'images')
    shutil.rmtree(train / 'digits')
    with pytest.raises(UsageError, match='its 4 folders with images share one name, so that all would be one class'):
        read_split()


@pytest.mark.parametrize('tar', [False, True])
def test_class_maps(folder, tar):
    file, (argv, name) = folder / 'map.txt', (pack(folder), 'train.tar') if tar else ([], 'train')
    file.write_text('class3\nclass1\n')
    with pytest.raises(UsageError) as caught:
        split(folder, *argv, '--class-map', file, name=name)
    assert str(caught.value).startswith(f'--class-map {file}: misses 2 of the 4 folders with images in ')
    assert '(class0, class2)' in str(caught.value)
    for start in ('', '\ufeff'):  # some editors begin a file with a mark
        file.write_text(f'{start}class3\nclass1\nother\nclass0\nclass2\n', encoding='utf-8')
        dataset = split(folder, *argv, '--class-map', file, name=name)
        assert class_names(dataset) == ['class3', 'class1', 'other', 'class0', 'class2']
        assert len(dataset) == 40 and split_card(dataset)['classes']['other'] == 0
        assert [int(target) for target in dataset.reader.targets] == [
            [3, 1, 4, 0][int(os.path.normpath(path)[5])] for path in dataset.reader.filenames()]
    with pytest.raises(UsageError, match='torchvision numbers the classes of torch/folder itself'):
        split(folder, '--dataset', 'torch/folder', '--class-map', file)


@pytest.mark.parametrize(('name', 'content', 'message'), [
    ('a.pkl', b'', 'Ran out of input'), ('a.pkl', b'no pickle', ''),
    ('a.pkl', pickle.dumps({'class0': 0})[:-5], ''),
    ('a.pkl', pickle.dumps(os.getcwd), 'is not permitted in a class map file'),
    ('a.pkl', pickle.dumps(['class0']), 'expected a dict'),
    *(('a.pkl', pickle.dumps(indices), 'not a class index for each name') for indices in (
        {}, {'class0': '0'}, {'class0': -1})),
    ('a.txt', b'class0\n\nclass1\n', 'a line without a name'), ('a.txt', b'class0\nclass0\nclass1\n', 'a name twice'),
    ('a.txt', b'\xff\xfe\x00', "can't decode byte"), ('a.csv', b'class0,0\n', 'Unsupported class map file extension')])
def test_a_damaged_class_map_is_refused(digits_folder, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError) as caught:
        split(digits_folder, '--class-map', tmp_path / name)
    text = str(caught.value)
    assert text.startswith(f'--class-map {tmp_path / name}: ') and message in text and '\n' not in text


def test_a_folder_that_holds_itself_is_refused(folder):
    (folder / 'train' / 'more').symlink_to(folder / 'validation' / 'class0')  # another folder is fine
    split(folder)
    for target in (folder / 'train' / 'class0', folder / 'train', folder):
        link = folder / 'train' / 'class0' / 'again'
        link.symlink_to(target)
        with pytest.raises(UsageError, match='is a link to a folder that contains it; remove it') as caught:
            split(folder)
        assert str(link) in str(caught.value)
        link.unlink()


def test_pipes_are_not_read(folder):
    os.mkfifo(folder / 'train' / 'class0' / 'pipe.png')
    assert split_card(split(folder))['not_read'] == {'pipes or devices': 1}


def test_keys_that_mean_nothing_are_refused(folder):
    with pytest.raises(UsageError, match='--target-key label: does not apply to'):
        split(folder, '--target-key', 'label')
    with pytest.raises(UsageError, match='--input-key .png: does not apply to'):
        split(folder, *pack(folder), '--input-key', '.png', name='train.tar')


def test_a_tar_member_without_bytes_is_skipped(folder, caplog):
    (folder / 'train' / 'class1' / '0000.png').write_bytes(b'')
    dataset = split(folder, *pack(folder), name='train.tar')
    labels = [dataset[i][1] for i in range(len(dataset))]
    assert labels == [int(name[7]) for name in dataset.reader.filenames()]
    assert [dataset.reader.filenames()[i] for i in dataset.replaced.nonzero()] == ['./class1/0000.png']
    assert 'Skipped sample ./class1/0000.png' in caplog.text


@pytest.mark.parametrize('damage', [lambda content: content[:len(content) // 2 + 100], lambda content: b'no tar'])
def test_a_damaged_tar_is_refused(folder, damage):
    argv = pack(folder)
    (folder / 'train.tar').write_bytes(damage((folder / 'train.tar').read_bytes()))
    with pytest.raises(UsageError, match="--data-dir .*: split 'train.tar' could not be read: "):
        split(folder, *argv, name='train.tar')


# Identity


def identity(*argv, name='train'):
    dataset = split(*argv, name=name)
    return data_identity(dataset, class_names(dataset))


def test_the_identity_of_a_folder(folder, tmp_path):
    before = identity(folder)
    assert before == {**before, 'version': 1, 'images': 40, 'classes': CLASSES}
    assert identity(shutil.copytree(folder, tmp_path / 'elsewhere')) == before
    assert data_changes(before, before) == {}

    image = next((folder / 'train' / 'class1').iterdir())
    image.rename(folder / 'train' / 'class2' / image.name)
    assert data_changes(before, identity(folder)) == {'files': 'other images or labels'}
    image.write_bytes((folder / 'train' / 'class2' / image.name).read_bytes())
    assert data_changes(before, identity(folder)) == {
        'images': '40 images before, now 41', 'files': 'other images or labels'}
    (folder / 'train' / 'class2' / image.name).unlink()
    assert identity(folder) == before
    (folder / 'train' / 'class1').rename(folder / 'train' / 'class9')
    assert data_changes(before, identity(folder))['classes'] == "class 1 was 'class1', now 'class2'"
    assert data_changes(before, {**before, 'classes': CLASSES[:3]}) == {'classes': "class 3 was 'class3', now none"}


def test_the_identity_of_other_data(folder):
    pack(folder, 'train', 'validation')
    found = [
        identity(*argv, name=f'{name}{ending}') for name in ('train', 'validation') for argv, ending in (
            ([folder], ''), ([folder], '.tar'), (['--dataset', 'digits'], ''),
            ([folder, '--dataset', 'torch/folder'], ''))]
    assert [each['images'] for each in found] == [40, 40, 1437, 40, 17, 17, 360, 17]
    assert len({each['files'] for each in found}) == 8
    assert found[3]['classes'] == CLASSES


class Cifar:
    """As torchvision has it: labels, and the name of the archive."""
    root, filename = '.', 'cifar-10-python.tar.gz'

    def __init__(self, targets):
        self.targets = targets

    def __len__(self):
        return len(self.targets)


def test_the_identity_of_data_without_file_names():
    def of(labels):
        return data_identity(Images(ArrayReader(Cifar(labels)), SOURCES['torch'], 'RGB'), ['a', 'b', 'c'])
    assert data_changes(of([2, 1, 0]), of([2, 1, 1])) == {'files': 'other images or labels'}
    assert of(torch.tensor([2, 1, 0])) == of([2, 1, 0])  # MNIST's
