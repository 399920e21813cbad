"""One drop-path rate for all blocks of a timm model, and stochastic depth that skips instead of masking.

Both are of cosub (Touvron et al. 2022, arXiv 2212.04884).
"""
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn as nn
from timm.layers import DropPath
from timm.models.convnext import ConvNeXtBlock
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Block
from timm.models.xcit import ClassAttentionBlock, XCABlock
from torch.utils.hooks import RemovableHandle

from ..compat import children_of

_logger = logging.getLogger(__name__)

_FAMILIES = 'VisionTransformer (deit, vit), SwinTransformer, ConvNeXt, RegNet, PiT, XCiT'

# Files of timm whose drop path is not (only) at the end of a residual branch, or has windows or pixels for samples
_REFUSED = ('byobnet', 'mobilevit', 'rdnet', 'resnest', 'tnt', 'vision_transformer_sam', 'vovnet')

# The branches that can skip: by block and drop path, their modules in the order in which they run. The first one takes
# the residual stream, and only the branch reads what it returns. A subclass is not meant, its forward may differ.
_PRE_NORM: dict[str, tuple[str, ...]] = {'drop_path1': ('norm1', 'attn'), 'drop_path2': ('norm2', 'mlp')}
_BRANCHES: dict[type[nn.Module], dict[str, tuple[str, ...]]] = {
    Block: _PRE_NORM,
    SwinTransformerBlock: _PRE_NORM,
    XCABlock: {**_PRE_NORM, 'drop_path3': ('norm3', 'local_mp')},
    ClassAttentionBlock: {'drop_path1': _PRE_NORM['drop_path1']},  # norm2 is in the shortcut
    ConvNeXtBlock: {'drop_path': ('conv_dw', 'norm', 'mlp')},
}


class SampleDropPath(DropPath):
    """Drop path with a mask from torch's default CPU generator, so that the host never waits for a device.

    Given a branch's first module, it skips: a hook gives that module only the rows that are kept, and the drop path
    scatters the branch's output back to those rows, which equals masking. If all are dropped, the first row runs with a
    weight of 0: modules don't take empty batches, and every parameter gets a gradient.
    """

    def __init__(self, drop_prob: float, scale_by_keep: bool = True):
        super().__init__(drop_prob, scale_by_keep)
        self.hook: RemovableHandle | None = None
        self._selected: tuple[int, torch.Tensor, float] | None = None

    def skip_from(self, first: nn.Module) -> None:
        """Skip, the branch's first module being `first`."""
        self.hook = first.register_forward_pre_hook(self._select)

    def _draw(self, num_rows: int) -> tuple[torch.Tensor, float]:
        """Return which rows are kept, (N,) bool on the host, and their weight."""
        keep_prob = 1 - self.drop_prob
        return torch.rand(num_rows, device='cpu') < keep_prob, 1 / keep_prob if self.scale_by_keep else 1.

    def _select(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not self.training:
            return None
        x, *others = args
        mask, weight = self._draw(len(x))
        kept = mask.nonzero().flatten()
        if not len(kept):
            kept, weight = torch.arange(len(x), device='cpu')[:1], 0.
        kept = kept.to(x.device, non_blocking=True)
        self._selected = len(x), kept, weight
        return _with_layout(lambda rows: rows.index_select(0, kept), x), *others

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        selected, self._selected = self._selected, None
        if selected is None:
            mask, weight = self._draw(len(x))
            scale = (mask.double() * weight).to(x.dtype).to(x.device, non_blocking=True)
            return x * scale.view(-1, *[1] * (x.dim() - 1))
        num_rows, kept, weight = selected
        return _with_layout(
            lambda rows: rows.new_zeros(num_rows, *rows.shape[1:]).index_add_(0, kept, rows, alpha=weight), x)


def _with_layout(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Apply a function of rows, whose output is contiguous, so that a channels-last tensor stays one."""
    if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return function(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return function(x)


def _drop_paths(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield block and attribute of each drop path, or of what timm has instead where the rate is 0."""
    for block in model.modules():
        for name, child in {**vars(block), **children_of(block)}.items():
            none = child is None or type(child) is nn.Identity
            if isinstance(child, DropPath) or (none and re.fullmatch(r'drop_path\d*', name)):
                yield block, name


def _first_of_branch(block: nn.Module, name: str) -> nn.Module | None:
    """Return the first module of the branch that a drop path ends, or None if the branch can't skip."""
    modules = [getattr(block, module) for module in _BRANCHES.get(type(block), {}).get(name, ())]
    # BatchNorm, and any other running statistics, need all rows
    if any(hasattr(part, 'running_var') for module in modules for part in module.modules()):
        return None
    return modules[0] if modules else None


def set_uniform_drop_path(model: nn.Module, rate: float, skip: bool = False) -> None:
    """Give every residual block of a timm model the same drop-path rate, the first one included.

    Covered are the blocks of VisionTransformer (deit, vit, with distillation token or layer scale), SwinTransformer
    (v1 and v2), ConvNeXt, RegNet, PiT and XCiT with its class attention, and of other timm models that name their drop
    path as these do. A second call replaces the first. Names in the state dict stay the same.

    With `skip`, branches run only on the samples that keep them. The masks are those without `skip` at the same state
    of torch's default CPU generator (as long as no dropout draws from it too), and the results equal to rounding. ViT,
    PiT, Swin v1 and ConvNeXt skip; XCiT skips but for its local patch interaction (BatchNorm) and the class
    attention's MLP; all other branches are masked, and a warning says so. A ViT that skips takes no `attn_mask` that
    differs by sample.

    Args:
        model: The model, changed in place.
        rate: Probability in (0, 1) that a sample drops a branch.
        skip: Skip dropped branches instead of masking their output.

    Raises:
        ValueError: The rate is out of range, or the model has no drop path, or one outside of residual branches.
    """
    if not 0 < rate < 1:
        raise ValueError(f'drop-path rate is {rate}, expected a value in (0, 1)')
    places = list(_drop_paths(model))
    if not places:
        raise ValueError(f'{type(model).__name__} has no drop path; families that work: {_FAMILIES}')
    for block, _ in places:
        if type(block).__module__ in [f'timm.models.{name}' for name in _REFUSED]:
            raise ValueError(
                f'{type(model).__name__}: drop path of {type(block).__name__} is not at the end of a residual branch; '
                f'families that work: {_FAMILIES}')
    masked = []
    for block, name in places:
        old = getattr(block, name)
        if isinstance(old, SampleDropPath) and old.hook is not None:
            old.hook.remove()
        drop_path = SampleDropPath(rate, getattr(old, 'scale_by_keep', True)).train(block.training)
        setattr(block, name, drop_path)
        first = _first_of_branch(block, name) if skip else None
        if first is not None:
            drop_path.skip_from(first)
        else:
            masked.append(f'{type(block).__name__}.{name}')
    if skip and masked:
        _logger.warning(
            f'{type(model).__name__}: {len(masked)} of {len(places)} residual branches are masked instead of skipped '
            f'({", ".join(dict.fromkeys(masked))}): BatchNorm, or an order of modules that does not allow it')
