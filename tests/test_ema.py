"""The moving average equals timm's, update by update, wherever the tensors lie."""
import copy

import pytest
import timm
import torch
from timm.utils import ModelEmaV3

from timm_vpl import PairWrapper
from timm_vpl.ema import Ema


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
