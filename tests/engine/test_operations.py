"""The operations that training takes, against counts of their own, and the environment of a run."""

import pytest
import timm
import torch
import torch.nn as nn

from timm_vpl import PairTask, PairWrapper, StagedLoss, Teacher, VPLLoss, base_term
from timm_vpl.engine.environment import environment
from timm_vpl.engine.models import training_flops

CONFIG = {'input_size': (3, 32, 32), 'mean': (0.5,) * 3, 'std': (0.5,) * 3, 'interpolation': 'bicubic'}


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
