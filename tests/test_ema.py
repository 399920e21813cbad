"""The moving average equals timm's, update by update, wherever the tensors lie."""
import copy

import pytest
import timm
import torch
from timm.utils import ModelEmaV3

from timm_vpl import PairWrapper
from timm_vpl.core.ema import Ema


class Wrapped(torch.nn.Module):
    """A model around another, as adapters are."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def get_classifier(self):
        return self.base.get_classifier()

    def forward(self, x):
        return self.base(x)


@pytest.mark.parametrize('kwargs', [{}, {'foreach': False}], ids=str)
def test_ema_follows_what_was_replaced(kwargs):
    torch.manual_seed(0)
    pair = PairWrapper(timm.create_model('test_resnet', num_classes=5), timm.create_model('test_vit', num_classes=5))
    emas = [ModelEmaV3(pair, decay=0.9, **kwargs), Ema(pair, decay=0.9, **kwargs)]
    wrapped = Wrapped(pair.model_b)
    shape = pair.model_a.layer1[0].conv1.weight.shape
    wrapped.num_classes = 5
    changes = [
        lambda: setattr(pair.model_a.layer1[0], 'conv1', torch.nn.Conv2d(
            shape[1], shape[0], shape[2], padding=1, bias=False)),
        lambda: pair.reset_classifier(5),
        lambda: setattr(pair, 'model_a', timm.create_model('test_resnet', num_classes=5)),
        lambda: setattr(pair, 'model_b', wrapped),
    ]
    for step, change in enumerate([*changes, lambda: None], 2):
        for ema in emas:
            ema.update(pair, step=step)
        timms, ours = (ema.module.state_dict() for ema in emas)
        assert all(torch.equal(timms[key], ours[key]) for key in timms), step
        change()

    pair.model_b.base.norm = torch.nn.LayerNorm(3)
    with pytest.raises(RuntimeError, match='setup_ema'):
        emas[1].update(pair, step=9)


@pytest.mark.parametrize('kwargs', [{}, {'use_warmup': True}, {'foreach': False}], ids=str)
def test_ema_is_that_of_timm(kwargs):
    torch.manual_seed(0)
    pair = PairWrapper(timm.create_model('test_resnet', num_classes=5), timm.create_model('test_vit', num_classes=5))
    emas = [ModelEmaV3(pair, decay=0.9, **kwargs), Ema(pair, decay=0.9, **kwargs)]
    for step in range(1, 7):
        for tensor in [*pair.parameters(), *pair.buffers()]:
            tensor.data.add_(torch.randn(tensor.shape) if tensor.is_floating_point() else 1)
        if step == 3:  # tensors are replaced
            pair.double().float()
            emas[1].module.double().float()
        if step == 5:
            state = copy.deepcopy(emas[0].module.state_dict())
            emas[1].module.load_state_dict(state)
            emas[1] = copy.deepcopy(emas[1])
        for ema in emas:
            ema.update(pair, step=step)
        timms, ours = (ema.module.state_dict() for ema in emas)
        assert all(torch.equal(timms[key], ours[key]) for key in timms)
        assert not torch.equal(ours['model_b.head.weight'], pair.state_dict()['model_b.head.weight']) or step == 1
