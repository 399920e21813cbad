"""A frozen teacher: what it says of a batch that was prepared for its student."""
from typing import Any

import torch
import torch.nn as nn

from .inputs import InputTransform
from .pair import Branch


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
