"""A frozen teacher: what it says of a batch that was prepared for its student."""
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from .pair import Branch


class InputTransform(nn.Module):
    """From images prepared for one model to images prepared for another, on the device.

    Normalised anew and resized, each only where the two differ: with equal configurations it returns its input.

    Args:
        source: Data configuration (mean, std, input_size) of the images that come.
        target: Data configuration that the model wants.
    """

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

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.size is not None:
            input = F.interpolate(input, self.size, mode=self.mode, antialias=True)
        if self.renormalize:
            input = input * self.scale.to(input.dtype) + self.shift.to(input.dtype)
        return input


class Teacher(nn.Module):
    """A frozen network in the place of the other branch: in evaluation mode, without gradient, not in any checkpoint.

    Args:
        model: The trained model.
        side: Side whose place it takes, 'a' or 'b'.
        data_config: Data configuration of the model.
        input_config: Data configuration of the images that it will get.

    Raises:
        ValueError: The model has no classifier whose input could be the embedding.
    """

    def __init__(self, model: nn.Module, side: str, data_config: dict[str, Any], input_config: dict[str, Any]):
        super().__init__()
        self.side = side
        self.data_config = data_config
        self.prepare = InputTransform(input_config, data_config)
        self.branch = Branch(model.requires_grad_(False), side)
        self.eval()

    @property
    def embed_dim(self) -> int:
        """Width of the embedding."""
        return self.branch.embed_dim

    def train(self, mode: bool = True) -> 'Teacher':
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, input: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the fields of a PairOutput that are the teacher's."""
        logits, embed, _ = self.branch(self.prepare(input))
        return {f'logits_{self.side}': logits, f'embed_{self.side}': embed}
