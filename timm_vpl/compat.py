"""Private members of torch and timm that this package leans on, each with what to do when it goes.

All were checked with torch 2.14 and timm 1.0.31.
"""
# Engine
from typing import Any

import torch
import torch.nn as nn
from timm.models._hub import save_config_for_hf
from torch.nn.modules.batchnorm import _BatchNorm


def write_config(model: nn.Module, path: str, **kwargs: Any) -> None:
    """Write timm's config.json of a model without its weights.

    timm.models._hub.save_config_for_hf. If it goes: timm.models.save_for_hf, which writes the weights too.
    """
    save_config_for_hf(model, path, **kwargs)


def has_batch_norm(model: nn.Module) -> bool:
    """Return whether a model has BatchNorm of any kind.

    torch.nn.modules.batchnorm._BatchNorm. If it goes: name each class.
    """
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def compile_modes() -> list[str]:
    """Return the modes of torch.compile.

    torch._inductor.list_mode_options. If it goes: torch.compile refuses an unknown mode at the first step.
    """
    return list(torch._inductor.list_mode_options())


def found_bad(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> torch.Tensor | None:
    """Return whether `unscale_` found a gradient that is not finite: 0-d on the device, above 0 if so.

    None where there is no gradient.

    GradScaler._per_optimizer_states. If it goes: look at each gradient, a second pass.
    """
    return next(iter(scaler._per_optimizer_states[id(optimizer)]['found_inf_per_device'].values()), None)


def let_scaler_skip(optimizer: torch.optim.Optimizer) -> None:
    """Let a GradScaler leave out a step of torch's fused SGD, not the kernel.

    The kernel leaves the momentum uninitialised where it skips the first step.
    Optimizer._step_supports_amp_scaling. If it goes: refuse fused SGD under a GradScaler.
    """
    if isinstance(optimizer, torch.optim.SGD) and hasattr(optimizer, '_step_supports_amp_scaling'):
        optimizer._step_supports_amp_scaling = False
