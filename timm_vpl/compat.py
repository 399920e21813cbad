"""Private members of torch and timm, and fixes for them, each with what to do if it is removed.

All were checked with torch 2.14 and timm 1.0.31.
"""
import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import timm.data.auto_augment
import torch
import torch.nn as nn
from huggingface_hub import constants
from PIL import Image, ImageOps
from timm.data.dataset_factory import _search_split as search_split  # if it is removed: copy its 20 lines
from timm.models._hub import save_config_for_hf
from timm.utils import ModelEmaV3
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = [
    'children_of', 'compile_apart', 'compile_modes', 'found_bad', 'guard_posterize', 'has_batch_norm',
    'hub_offline', 'lerp_', 'let_scaler_skip', 'search_split', 'shard_decoder', 'tensor_places', 'write_config']


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """Return a module's children by name, None where an attribute was set to it: the live dict.

    nn.Module._modules. If it is removed: dict(module.named_children()), a copy at each call.
    """
    return module._modules


def tensor_places(module: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Return where a module keeps its parameters and persistent buffers; the tensors themselves may be replaced.

    nn.Module._parameters, _buffers, _non_persistent_buffers_set. If one is removed: `Ema` without `apply_update_`, as
    timm's.
    """
    return [
        (slots, name)
        for each in module.modules()
        for slots, passing in ((each._parameters, set()), (each._buffers, each._non_persistent_buffers_set))
        for name, tensor in slots.items() if tensor is not None and name not in passing]


def lerp_(ema: ModelEmaV3, averages: list[torch.Tensor], values: list[torch.Tensor], weight: float) -> None:
    """Interpolate an average's tensors towards a model's, with timm's rounding.

    ModelEmaV3._foreach_lerp_. If it is removed: `Ema` without `apply_update_`, as timm's.
    """
    ema._foreach_lerp_(averages, values, weight=weight)


def compile_apart(module: nn.Module, name: str, **kwargs: Any) -> None:
    """Compile a module's forward with torch.compile(**kwargs) as separate code; a copy starts uncompiled.

    Dynamo counts versions (8 at most) and learns which sizes vary for each code object. Modules of one class share
    theirs: of two with images of different size, the second would be compiled for images of any size.

    nn.Module._compiled_call_impl, which a call runs in place of the forward and a copy leaves out. If it is removed:
    keep the compiled function beside the module, call it in forward, and leave it out in __getstate__.
    """
    function = type(module).forward
    own = FunctionType(function.__code__.replace(co_name=name), function.__globals__)
    module._compiled_call_impl = torch.compile(MethodType(own, module), **kwargs)


def guard_posterize() -> None:
    """Let timm's posterize take 0 bits: a black image.

    timm asks for 0 bits, which Pillow 13 refuses. Remove this once timm no longer asks for them.
    """
    operations = timm.data.auto_augment.NAME_TO_OP
    for name in ('Posterize', 'PosterizeIncreasing', 'PosterizeOriginal'):
        operations[name] = _posterize


def _posterize(img: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    if bits_to_keep >= 8:
        return img
    if bits_to_keep < 1:
        return Image.new(img.mode, img.size)
    return ImageOps.posterize(img, bits_to_keep)


def shard_decoder(reader: Any) -> Callable[[dict[str, Any]], dict[str, Any] | None]:
    """Return timm's function that decodes a sample of a shard: `jpg`, whatever it is, and `target`; None to skip it.

    timm.data.readers.reader_wds._decode. If it is removed: the last stages of the pipeline that the reader makes.
    """
    from timm.data.readers.reader_wds import _decode  # it imports webdataset, an extra
    return partial(
        _decode, image_key=reader.input_key, image_mode=reader.input_img_mode,
        target_key=reader.target_keys or reader.target_key, alt_label=reader.split_info.alt_label)


def write_config(model: nn.Module, path: str, **kwargs: Any) -> None:
    """Write timm's config.json of a model without its weights.

    timm.models._hub.save_config_for_hf. If it is removed: timm.models.save_for_hf, which writes the weights too.
    """
    save_config_for_hf(model, path, **kwargs)


def has_batch_norm(model: nn.Module) -> bool:
    """Return whether a model has BatchNorm of any kind.

    torch.nn.modules.batchnorm._BatchNorm. If it is removed: name each class.
    """
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def compile_modes() -> dict[str, bool]:
    """Return of each mode of torch.compile whether it records CUDA graphs.

    torch._inductor.list_mode_options. If it is removed: torch.compile refuses an unknown mode at the first step;
    'max-autotune' and 'reduce-overhead' record.
    """
    return {mode: options.get('triton.cudagraphs', False)
            for mode, options in torch._inductor.list_mode_options().items()}


@contextlib.contextmanager
def hub_offline() -> Iterator[None]:
    """Let the client of the Hub use its cache only, without any request.

    huggingface_hub.constants.HF_HUB_OFFLINE. If it is removed: the client tries for a minute to reach a Hub that is
    unreachable.
    """
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def found_bad(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> torch.Tensor | None:
    """Return whether `unscale_` found a gradient that is not finite: 0-d on the device, above 0 if so.

    None where there is no gradient.

    GradScaler._per_optimizer_states. If it is removed: check each gradient, in a second pass.
    """
    return next(iter(scaler._per_optimizer_states[id(optimizer)]['found_inf_per_device'].values()), None)


def let_scaler_skip(optimizer: torch.optim.Optimizer) -> None:
    """Let a GradScaler leave out a step of torch's fused SGD, not the kernel.

    The kernel leaves the momentum uninitialised where it skips the first step.
    Optimizer._step_supports_amp_scaling. If it is removed: refuse fused SGD under a GradScaler.
    """
    if isinstance(optimizer, torch.optim.SGD) and hasattr(optimizer, '_step_supports_amp_scaling'):
        optimizer._step_supports_amp_scaling = False
