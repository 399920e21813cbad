"""The identity of data, and the operations that training takes, against counts of their own."""
import shutil
import tarfile

import pytest
import timm
import torch
import torch.nn as nn
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

from timm_vpl import PairTask, PairWrapper, StagedLoss, Teacher, VPLLoss, base_term
from timm_vpl.data.data import class_names, create_split
from timm_vpl.data.identity import data_changes, data_identity
from timm_vpl.engine.build import training_flops
from timm_vpl.engine.environment import environment
from timm_vpl.options.options import parse_args

CONFIG = {'input_size': (3, 32, 32), 'mean': (0.5,) * 3, 'std': (0.5,) * 3, 'interpolation': 'bicubic'}


def identity(*options, name='train'):
    args = parse_args(['--model-a', 'test_resnet', '--method', 'solo', *map(str, options)])
    dataset = create_split(args, name, is_training=name == 'train')
    return data_identity(dataset, class_names(dataset))


@pytest.fixture
def folder(digits_folder, tmp_path):
    return shutil.copytree(digits_folder, tmp_path / 'data')


def test_the_identity_of_a_folder(folder, tmp_path):
    before = identity(folder)
    assert before == {**before, 'version': 1, 'images': 40, 'classes': ['class0', 'class1', 'class2', 'class3']}
    assert identity(shutil.copytree(folder, tmp_path / 'elsewhere')) == before
    assert data_changes(before, before) == {}
    # torchvision's reader has the same images and classes.
    dataset = ImageFolder(folder / 'train')
    assert data_identity(dataset, dataset.classes) == {**before, 'files': data_identity(dataset, None)['files']}

    image = next((folder / 'train' / 'class1').iterdir())
    image.rename(folder / 'train' / 'class2' / image.name)
    assert data_changes(before, identity(folder)) == {'files': 'other images or labels'}
    image.write_bytes((folder / 'train' / 'class2' / image.name).read_bytes())
    assert data_changes(before, identity(folder)) == {
        'images': '40 images before, now 41', 'files': 'other images or labels'}
    (folder / 'train' / 'class2' / image.name).unlink()
    assert identity(folder) == before
    (folder / 'train' / 'class1').rename(folder / 'train' / 'class9')
    (folder / 'validation' / 'class1').rename(folder / 'validation' / 'class9')
    assert data_changes(before, identity(folder))['classes'] == "class 1 was 'class1', now 'class2'"


def test_the_identity_of_other_data(folder):
    found = [identity(folder), identity(folder, name='validation')]
    digits = [identity('--dataset', 'digits', name=name) for name in ('train', 'validation')]
    assert [each['images'] for each in digits] == [1437, 360]
    for split in ('train', 'validation'):
        with tarfile.open(folder / f'{split}.tar', 'w') as tar:
            tar.add(folder / split, arcname='.')
    tars = [identity(folder, '--train-split', 'train.tar', '--val-split', 'validation.tar', name=f'{split}.tar')
            for split in ('train', 'validation')]
    assert [each['images'] for each in tars] == [40, 17]
    assert len({each['files'] for each in (*found, *digits, *tars)}) == 6
    shorter = {**found[0], 'classes': found[0]['classes'][:3]}
    assert data_changes(found[0], shorter) == {'classes': "class 3 was 'class3', now none"}


class Cifar(Dataset):
    """As torchvision has it: labels, and the name of the archive."""
    filename = 'cifar-10-python.tar.gz'

    def __init__(self, targets):
        self.targets = targets

    def __len__(self):
        return len(self.targets)


def test_the_identity_of_torchvision_data():
    before, now = (data_identity(Cifar(labels), ['a', 'b', 'c']) for labels in ([2, 1, 0], [2, 1, 1]))
    assert data_changes(before, now) == {'files': 'other images or labels'}


def test_the_environment_is_plain_and_stable():
    found = environment(torch.device('cpu'))
    assert found == environment(torch.device('cpu')) and found['device'].startswith('cpu, ')
    assert {type(value) for value in found.values()} == {str, int}


# Operations


def products(model, size):
    """Return the multiply-adds of a forward pass, times 2, by layer: of convolutions, linear layers and attention."""
    found = []

    def count(module, inputs, output):
        if isinstance(module, nn.Conv2d):
            kernel = module.weight[0].numel()
            found.append(2 * kernel * output.numel())
        elif isinstance(module, nn.Linear):
            found.append(2 * module.in_features * output.numel())
        else:  # attention of test_vit: queries with keys, then weights with values
            tokens, width = inputs[0].shape[1:]
            found.append(2 * 2 * tokens * tokens * width)

    hooks = [module.register_forward_hook(count) for module in model.modules()
             if isinstance(module, (nn.Conv2d, nn.Linear)) or type(module).__name__ == 'Attention']
    model.eval()(torch.zeros(1, *size))
    for hook in hooks:
        hook.remove()
    return found


@pytest.fixture
def models():
    return {
        'a': timm.create_model('test_resnet', num_classes=10),
        'b': timm.create_model('test_vit', num_classes=10, img_size=32, patch_size=8)}


def training(model):
    """Forward, and a backward of twice as much, but for the first layer, whose input needs no gradient."""
    layers = products(model, CONFIG['input_size'])
    return 3 * sum(layers) - layers[0]


def test_the_operations_of_a_pair(models):
    task = PairTask(PairWrapper(models['a'], models['b']), VPLLoss(2), verbose=False)
    task.train()
    found = training_flops(task, {'a': CONFIG, 'b': CONFIG})
    assert found == training(models['a']) + training(models['b'])
    assert task.trainable_module.training and all(p.grad is None for p in task.trainable_module.parameters())


def test_the_operations_of_further_forwards(models):
    forward = sum(products(models['a'], CONFIG['input_size']))
    phases = StagedLoss([base_term('a'), base_term('b')._replace(phase=1)], phases=('a', 'b'))
    task = PairTask(PairWrapper(models['a'], models['b']), phases, verbose=False)
    assert training_flops(task, {'a': CONFIG, 'b': CONFIG}) == (
        training(models['a']) + training(models['b']) + forward)
    teacher = Teacher(timm.create_model('test_resnet', num_classes=10), 'a', CONFIG, CONFIG)
    task = PairTask(PairWrapper(None, models['b']), StagedLoss([base_term('b')]), teacher=teacher, verbose=False)
    assert training_flops(task, {'b': CONFIG}) == training(models['b']) + forward
    views = StagedLoss([base_term('a'), base_term('b')], views=2)
    task = PairTask(PairWrapper(None, models['b']), views, verbose=False)
    assert training_flops(task, {'b': CONFIG}) == 2 * training(models['b'])
