"""A frozen teacher: its outputs for a batch that was prepared for its student."""
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn

from .inputs import InputTransform
from .pair import Branch


class Teacher(nn.Module):
    """A frozen network: in evaluation mode, without gradient, not in any checkpoint.

    A model of timm's gives logits and embedding; one without a classifier (num_classes=0) the embedding; any other
    module its output as logits (N, C).

    Args:
        model: The trained model.
        side: 'a' or 'b', the branch that it replaces, or 'teacher' beside a pair.
        data_config: Data configuration of the model.
        input_config: Data configuration of the images that it will get.

    Raises:
        ValueError: The model has a classifier whose input can't be the embedding.

    Examples:
        >>> from timm.data import resolve_data_config
        >>> model = timm.create_model('test_resnet')
        >>> config = resolve_data_config(model=model)
        >>> teacher = Teacher(model, 'teacher', config, {**config, 'input_size': (3, 64, 64)})
        >>> teacher(torch.randn(2, 3, 64, 64))['logits_teacher'].shape
        torch.Size([2, 1000])
    """

    def __init__(self, model: nn.Module, side: str, data_config: dict[str, Any], input_config: dict[str, Any]):
        super().__init__()
        self.side = side
        self.data_config = data_config
        self.prepare = InputTransform(input_config, data_config)
        self.branch = Branch(model.requires_grad_(False), side, teaches=True)
        self.eval()

    @property
    def embed_dim(self) -> int:
        """Width of the embedding."""
        return self.branch.embed_dim

    def tap(self, names: Sequence[str]) -> None:
        """Let each forward give these features and no others (`Branch.tap`)."""
        self.branch.tap(names)

    def train(self, mode: bool = True) -> 'Teacher':
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, input: torch.Tensor) -> dict[str, Any]:
        """Return the fields of a PairOutput that are the teacher's."""
        logits, embed, _, features = self.branch(self.prepare(input))
        return {f'logits_{self.side}': logits, f'embed_{self.side}': embed, f'features_{self.side}': features}
