"""From images prepared for one model to images prepared for another, on the device."""
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F


class InputTransform(nn.Module):
    """Normalise images again and resize them, each only where the two configurations differ.

    With equal configurations it returns its input. Nothing of it is in a state_dict.

    Args:
        source: Data configuration (mean, std, input_size) of the images that come, (N, C, H, W).
        target: Data configuration that the model wants.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, source: dict[str, Any], target: dict[str, Any]):
        super().__init__()
        # Decided here once: a comparison on the device would make the host wait for it in each step.
        mean, std, new_mean, new_std = (
            torch.tensor(config[key]).view(-1, 1, 1) for config in (source, target) for key in ('mean', 'std'))
        self.renormalize = not (torch.equal(mean, new_mean) and torch.equal(std, new_std))
        self.register_buffer('scale', std / new_std, persistent=False)
        self.register_buffer('shift', (mean - new_mean) / new_std, persistent=False)
        size = tuple(target['input_size'][-2:])
        self.size = None if size == tuple(source['input_size'][-2:]) else size
        self.mode = 'bilinear' if target.get('interpolation') == 'bilinear' else 'bicubic'

    def __bool__(self) -> bool:
        """Return whether it does anything."""
        return self.renormalize or self.size is not None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.size is not None:
            # torch resizes no half precision with antialiasing on a CPU.
            input = F.interpolate(input.float() if input.itemsize < 4 else input, self.size, mode=self.mode,
                                  antialias=True).to(input.dtype)
        if self.renormalize:
            input = input * self.scale.to(input.dtype) + self.shift.to(input.dtype)
        return input
