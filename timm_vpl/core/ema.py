"""timm's moving average of the weights, without a walk through both models' state dicts at each update."""
from typing import Any

import torch
import torch.nn as nn
from timm.utils import ModelEmaV3

from ..compat import children_of, lerp_, tensor_places


class Ema(ModelEmaV3):
    """ModelEmaV3 that remembers where the tensors of both models are, until a submodule is replaced.

    The walk takes the host longer than the update: for ResNet-50 and ViT-Base some 800 tensors, twice a step. The
    arguments are timm's.

    Raises:
        RuntimeError: At an update, the model and its average have different tensors.
    """

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any):
        super().__init__(model, *args, **kwargs)
        # Of a model and its average: where each tensor is in both; each module's children, now and when last seen.
        self._places: tuple[nn.Module, list[Any], list[Any]] | None = None

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        """Interpolate parameters and buffers."""
        if self._places is None or self._places[0] is not model or any(now != then for now, then in self._places[2]):
            self._places = self._find(model)
        if not self.foreach:
            super().apply_update_(model, decay)
            return
        floats: tuple[list[torch.Tensor], list[torch.Tensor]] = [], []
        for (ema_slots, ema_name), (slots, name) in self._places[1]:
            average, value = ema_slots[ema_name], slots[name]
            if average.is_floating_point():
                floats[0].append(average)
                floats[1].append(value)
            else:
                average.copy_(value)
        lerp_(self, *floats, weight=1. - decay)

    def _find(self, model: nn.Module) -> tuple[nn.Module, list[Any], list[Any]]:
        places = tensor_places(self.module), tensor_places(model)
        if [slots[name].shape for slots, name in places[0]] != [slots[name].shape for slots, name in places[1]]:
            raise RuntimeError(
                'the model and its moving average have different tensors: a submodule was replaced; call setup_ema() '
                'after that')
        children = [children_of(each) for root in (self.module, model) for each in root.modules()]
        return model, list(zip(*places, strict=True)), [(now, dict(now)) for now in children]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), '_places': None}
