"""timm's moving average of the weights, without a walk through both models' state dicts at each update."""
import torch
import torch.nn as nn
from timm.utils import ModelEmaV3


class Ema(ModelEmaV3):
    """ModelEmaV3 that remembers where the tensors of both models lie, until a submodule is replaced.

    The walk takes the host longer than the update: for ResNet-50 and ViT-Base some 800 tensors, twice a step. The
    arguments are timm's.

    Raises:
        RuntimeError: At an update, the model has other tensors than its average.
    """

    def __init__(self, model: nn.Module, *args, **kwargs):
        super().__init__(model, *args, **kwargs)
        # Of a model and its average: where each tensor lies in both; each module's children, now and when last seen.
        self._places: tuple[nn.Module, list, list] | None = None

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
        self._foreach_lerp_(*floats, weight=1. - decay)

    def _find(self, model):
        places = _places(self.module), _places(model)
        if [slots[name].shape for slots, name in places[0]] != [slots[name].shape for slots, name in places[1]]:
            raise RuntimeError(
                'the model has other tensors than its moving average: a submodule of another shape was put in, '
                'set up the average after that (setup_ema)')
        children = [(each._modules, dict(each._modules)) for root in (self.module, model) for each in root.modules()]
        return model, list(zip(*places, strict=True)), children

    def __getstate__(self):
        return {**super().__getstate__(), '_places': None}


def _places(module: nn.Module) -> list[tuple[dict, str]]:
    """Return where a module's parameters and persistent buffers are kept: the tensors themselves may be replaced."""
    return [
        (slots, name)
        for each in module.modules()
        for slots, passing in ((each._parameters, ()), (each._buffers, each._non_persistent_buffers_set))
        for name, tensor in slots.items() if tensor is not None and name not in passing]
