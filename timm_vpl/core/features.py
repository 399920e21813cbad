"""Feature maps by name: which module of a model gives them, and how they become (N, d, h, w)."""
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn

EMBED = 'embed'  # the name of the embedding, before any affine layer


def stages_of(model: Any) -> dict[str, str]:
    """Return the modules of a model's stages by name, 'stage1' to 'stage4', the last next to the head.

    A hierarchical network has a stage for each resolution, of which the last four count. In a network of one
    resolution, such as a plain ViT, a stage ends with each quarter of the blocks. The stages follow timm's
    `feature_info`.
    """
    info = getattr(model, 'feature_info', None) or ()
    last: dict[Any, str] = {each['reduction']: each['module'] for each in getattr(info, 'info', info)}
    modules = list(last.values())[-4:]
    if len(modules) == 1:
        blocks = [each['module'] for each in info]
        modules = [blocks[-(-len(blocks) * quarter // 4) - 1] for quarter in range(1, 5)]
    return {f'stage{i}': name for i, name in enumerate(modules, start=1)}


def find_module(model: Any, name: str, where: str) -> nn.Module:
    """Return the module whose output is a feature: of a stage, or of a module's own name; errors begin with `where`.

    Raises:
        ValueError: The model has no feature of this name.
    """
    stages = stages_of(model)
    try:
        module: nn.Module = model.get_submodule(stages.get(name, name))
    except AttributeError:
        modules = dict(model.named_modules())
        there = [stage for stage, module in stages.items() if module in modules]  # timm may name others
        raise ValueError(
            f'{where} ({type(model).__name__}) has no feature {name!r}: expected one of {", ".join([*there, EMBED])}, '
            f'or the name of a module') from None
    while isinstance(module, nn.Sequential) and len(module):
        module = module[-1]  # with gradient checkpointing timm calls its members alone
    return module


def as_map(model: Any, name: str, outputs: Sequence[Any], size: tuple[int, int]) -> torch.Tensor:
    """Return the last output of a module as a map (N, d, h, w), tokens of classes and registers left out.

    Args:
        model: The model.
        name: Of the feature.
        outputs: What the module gave: (N, d, h, w); (N, h, w, d) where the model's `output_fmt` is 'NHWC' or the
            proportions match those of the image; such a map with other things in a tuple; or tokens (N, L, d) of a grid
            that has the proportions of the image.
        size: Height and width of the image.

    Raises:
        ValueError: The output is none of these.
    """
    output: torch.Tensor | Any = outputs[-1] if outputs else None
    if type(output) is tuple:  # PiT: the map and the tokens of classes
        maps_of = [each for each in output if getattr(each, 'ndim', 0) == 4]
        output = maps_of[0] if maps_of else output
    shape: tuple[int, ...] = tuple(output.shape) if isinstance(output, torch.Tensor) else ()
    if len(shape) == 4:
        last = getattr(model, 'output_fmt', '') == 'NHWC' or (
            _has_proportions(shape[1:3], size) and not _has_proportions(shape[2:], size))
        maps: torch.Tensor = output.permute(0, 3, 1, 2) if last else output
        return maps
    if len(shape) == 3 and not hasattr(model, 'reroll'):  # Hiera's tokens are in the order of its windows
        for prefix in (getattr(model, 'num_prefix_tokens', 0), 0):
            height = round(((shape[1] - prefix) * size[0] / size[1]) ** 0.5)
            width = (shape[1] - prefix) // max(height, 1)
            if height * width == shape[1] - prefix and height * size[1] == width * size[0]:
                maps = output[:, prefix:].transpose(1, 2).unflatten(2, (height, width))
                return maps
    raise ValueError(f'{type(model).__name__}: feature {name!r} is {shape or type(output).__name__}, expected a map '
                     f'(N, d, h, w) or tokens (N, L, d) of a grid')


def _has_proportions(grid: tuple[int, ...], size: tuple[int, int]) -> bool:
    """Return whether a grid has the proportions of the image, up to what rounding at each stage may do."""
    return abs(grid[0] * size[1] - grid[1] * size[0]) <= 2 * max(size)
