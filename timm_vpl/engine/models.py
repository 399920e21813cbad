"""The one module that builds models: branches, the pair of a run, and their data configurations."""
import contextlib
import functools
import json
import logging
import math
import pickle
import re
import socket
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
import torch.nn as nn
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from timm.data import resolve_data_config
from timm.data.loader import adapt_to_chs
from timm.layers import convert_sync_batchnorm
from timm.models import create_model, get_pretrained_cfg, list_pretrained
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..compat import has_batch_norm, hub_offline, write_config
from ..core.features import EMBED
from ..core.methods import METHODS
from ..core.pair import PairWrapper, classifiers_of
from ..core.processes import Processes
from ..core.seeding import seed_all
from ..core.stochastic_depth import set_uniform_drop_path
from ..core.task import PairTask
from ..core.teacher import Teacher
from ..data.splits import names_of
from ..errors import UsageError, first_line
from ..options.checks import no_token
from ..options.parser import did_you_mean
from ..options.sections import INTERPOLATIONS
from ..options.train import Options
from .boundary import refusing

_logger = logging.getLogger(__name__)
_INPUT = ('img_size', 'crop_pct', 'mean', 'std', 'interpolation')  # how a branch's images are prepared


def resolve_data(options: Options) -> dict[str, dict[str, Any]]:
    """Return timm's data configuration of each branch, by side: its input size, statistics, interpolation and crop.

    They are the model's, as timm has them, unless the options say otherwise: a branch does not depend on its partner.
    """
    configs = {}
    for side in options.sides:
        cfg = pretrained_cfg_of(options.branches[side].model or '', f'--model-{side}')
        given = {key: getattr(options.branches[side], key) for key in _INPUT}
        config = resolve_data_config(
            {**given, 'in_chans': options.input.in_chans, 'input_size': options.input.input_size}, pretrained_cfg=cfg)
        if not options.input.input_size:
            in_chans = options.input.in_chans or 3  # as the images are read
            if not options.input.in_chans and cfg.get('input_size', (3,))[0] != in_chans:
                raise UsageError(
                    f'--model-{side} {options.branches[side].model} takes images of {cfg["input_size"][0]} channel(s); '
                    f'use --in-chans {cfg["input_size"][0]}')
            config['input_size'] = (in_chans, *config['input_size'][1:])
        for key in ('mean', 'std'):
            config[key] = tuple(adapt_to_chs(config[key], config['input_size'][0]))
        configs[side] = config
    return configs


def loader_config(configs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the configuration of the images that the branches share: that of the branch with the larger images."""
    return max(configs.values(), key=lambda config: math.prod(config['input_size']))


def pretrained_cfg_of(name: str, flag: str) -> dict[str, Any]:
    """Return timm's pretrained configuration of a model, {} where it has none; `flag` named the model."""
    if ':' in name:  # a source such as hf-hub: or local-dir: brings its own configuration
        with torch.device('meta'):
            return create_named(name, f'{flag} {name}').pretrained_cfg
    try:
        cfg = get_pretrained_cfg(name)
    except RuntimeError as e:
        raise UsageError(f'{flag} {name}: timm has no such pretrained weights{_near_tag(name)}') from e
    return cfg.to_dict() if cfg else {}


def _near_tag(name: str) -> str:
    """Return ', did you mean NAME.TAG?' if timm has no weights of a model's tag, else ''."""
    names = list_pretrained(f'{name.partition(".")[0]}.*')
    return did_you_mean(name, names) if '.' in name and name not in names else ''


def size_kwargs(cfg: dict[str, Any], input_size) -> dict[str, Any]:
    """Return the argument that builds a model for images of this size, where its architecture depends on the size."""
    height, width = input_size[-2:]
    if not cfg.get('fixed_input_size') or tuple(cfg['input_size'][-2:]) == (height, width):
        return {}
    return {'img_size': height if height == width else (height, width)}


def create_named(name: str, where: str, **kwargs) -> Any:
    """Create a model with timm; it has `pretrained_cfg` and more.

    Raises:
        UsageError: timm can't; the message begins with `where`.
    """
    is_away = not constants.HF_HUB_OFFLINE and _needs_hub(name, **kwargs) and hub_is_away(constants.ENDPOINT)
    try:
        with hub_offline() if is_away else contextlib.nullcontext():
            model: Any = create_model(name, **kwargs)
    except LocalEntryNotFoundError as e:
        why = f'{constants.ENDPOINT} cannot be reached' if is_away else 'HF_HUB_OFFLINE is set'
        raise UsageError(f'{where}: not in the cache of the Hub ({constants.HF_HUB_CACHE}), and {why}') from e
    except Exception as e:  # timm hardly checks a config.json or a file of weights
        if isinstance(e.__cause__, pickle.UnpicklingError):
            raise UsageError(
                f'{where}: refused, a file of its weights contains more than tensors and plain types') from e
        raise UsageError(f'{where}: cannot be built: {first_line(e, 300)}{_near_tag(name)}') from e
    if ':' in name:
        _check_config(model.pretrained_cfg, where)
    return model


def _needs_hub(name: str, pretrained: bool = False, **kwargs: Any) -> bool:
    """Return whether timm asks the Hub for a model's configuration or weights."""
    if ':' in name:
        return not name.startswith('local-dir:')
    return pretrained and 'pretrained_cfg_overlay' not in kwargs


@functools.cache
def hub_is_away(endpoint: str) -> bool:
    """Return whether no connection to the Hub can be made, in three attempts; not tested behind a proxy."""
    if getproxies().keys() & {'http', 'https', 'all'}:
        return False
    address = urlsplit(endpoint)
    port = address.port or (80 if address.scheme == 'http' else 443)
    for pause in (1, 1, 0):
        try:
            socket.create_connection((address.hostname, port), timeout=5).close()
            return False
        except OSError:
            time.sleep(pause)
    return True


def _is_number(value):
    return isinstance(value, (int, float)) and math.isfinite(value)


_VALID = {
    'input_size': lambda value: len(value) == 3 and all(isinstance(size, int) and 0 < size <= 4096 for size in value),
    'mean': lambda value: len(value) > 0 and all(map(_is_number, value)),
    'std': lambda value: len(value) > 0 and all(_is_number(std) and std > 0 for std in value),
    'crop_pct': lambda value: _is_number(value) and 0 < value < 2,
    'crop_mode': lambda value: value in ('center', 'squash', 'border'),
    'interpolation': lambda value: value in ('random', *INTERPOLATIONS),
    'num_classes': lambda value: isinstance(value, int) and value >= 0,
    'label_names': lambda value: not isinstance(value, str) and all(isinstance(name, str) for name in value),
}


def _check_config(cfg: dict[str, Any], where: str) -> None:
    """Raise UsageError for a foreign config.json on which timm would fail later."""
    for key, valid in _VALID.items():
        value = cfg.get(key)
        try:
            good = value is None or valid(value)
        except TypeError:
            good = False
        if not good:
            raise UsageError(f'{where}: invalid configuration: {key} is {str(value)[:80]!r}')


# Entries of timm's configuration about the weights that it would download, not about ours.
_PROVENANCE = (
    'tag', 'license', 'description', 'origin_url', 'paper_name', 'paper_ids', 'notes', 'label_names',
    'label_descriptions')


def branch_config(model: Any, data_config: dict[str, Any], class_names: list[str] | None) -> dict[str, Any]:
    """Return timm's config.json of a model: all that rebuilds it and prepares its images, but its weights."""
    cfg = model.pretrained_cfg
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'config.json'
        model.pretrained_cfg = {key: value for key, value in cfg.items() if key not in _PROVENANCE}
        try:
            write_config(
                model, str(path), model_config={'label_names': class_names or None}, data_config=data_config)
        finally:
            model.pretrained_cfg = cfg
        return json.loads(path.read_text())  # with lists for tuples, as after loading


def _model_kwargs(asked: Any, in_chans: int, num_classes: int) -> dict[str, Any]:
    """Return the arguments of timm's `create_model` by options of timm's names."""
    return {
        'pretrained': asked.pretrained,
        'in_chans': in_chans,
        'num_classes': num_classes,
        'drop_rate': asked.drop,
        'drop_path_rate': asked.drop_path if asked.drop_path is not None else asked.drop_connect,
        'drop_block_rate': asked.drop_block,
        'global_pool': asked.gp,
        'bn_momentum': asked.bn_momentum,
        'bn_eps': asked.bn_eps,
    }


def create_branch(options: Options, side: str, data_config: dict[str, Any], num_classes: int) -> nn.Module:
    """Create a branch's model with timm, its weights drawn from a separate stream.

    Raises:
        UsageError: timm can't build the model with these options.
    """
    asked = options.branches[side]
    name = asked.model or ''
    where = f'--model-{side} {name}'
    kwargs = _model_kwargs(asked, data_config['input_size'][0], num_classes)
    kwargs['checkpoint_path'] = asked.initial_checkpoint or None
    if asked.pretrained_path:
        # As in timm's script: a file's weights, whatever its number of classes.
        kwargs.update(pretrained=True, pretrained_cfg_overlay={'file': asked.pretrained_path, 'num_classes': -1})
    kwargs.update(size_kwargs(pretrained_cfg_of(name, f'--model-{side}'), data_config['input_size']))
    kwargs.update(asked.model_kwargs or {})
    uniform = METHODS[options.method].uniform_drop_path
    rate = (kwargs.pop('drop_path_rate') or 0.) if uniform else 0.
    seed_all(options.run.seed, 'init', side)
    model = create_named(name, where, **kwargs)
    if asked.pretrained_path:  # timm accepts a file none of whose weights fit
        seed_all(options.run.seed, 'init', side)
        drawn = create_named(name, where, **{**kwargs, 'pretrained': False, 'checkpoint_path': None})
        if all(map(torch.equal, model.state_dict().values(), drawn.state_dict().values())):
            raise UsageError(
                f'--pretrained-path-{side} {asked.pretrained_path}: no weights fit {name}: its keys are those of '
                f'another model, or have a prefix')
    with refusing(where, ValueError):  # no classifier, as where a config.json asks for features
        _initialize_head(model, asked.head_init_scale, asked.head_init_bias)
    if uniform:
        with refusing(f'{where}: --method {options.method} cannot train it', ValueError):
            set_uniform_drop_path(model, rate, skip=options.own.drop_path_skip)
    if asked.grad_checkpointing:
        model.set_grad_checkpointing(enable=True)
    return model


@torch.no_grad()
def _initialize_head(model, scale, bias):
    for layer in (module for head in classifiers_of(model) for module in head.modules() if hasattr(module, 'weight')):
        if scale is not None:
            for parameter in layer.parameters(recurse=False):
                parameter.mul_(scale)
        if bias is not None and layer.bias is not None:
            nn.init.constant_(layer.bias, bias)


def create_pair(
        options: Options,
        configs: dict[str, dict[str, Any]],
        num_classes: int,
        processes: Processes,
        teacher: Teacher | None = None,
) -> PairWrapper:
    """Create the pair on its device, ready to train.

    Args:
        options: Options.
        configs: Data configuration of each branch.
        num_classes: Number of classes.
        processes: The processes; the pair will be on the device of this one.
        teacher: Frozen teacher of a method that has one.

    Raises:
        UsageError: A model can't be built or can't be a branch, or BatchNorm would see one image.
    """
    device = processes.device
    sync_bn = options.batch_norm.sync_bn and processes.distributed
    if options.batch_norm.sync_bn and device.type != 'cuda':
        raise UsageError(f'--sync-bn: torch supports it on CUDA devices only, not on {device.type}')
    if options.batch_norm.sync_bn and not processes.distributed:
        _logger.warning('--sync-bn: no effect with one process')
    models: dict[str, Any] = {side: create_branch(options, side, configs[side], num_classes) for side in options.sides}
    _check_models(options, models, sync_bn)
    student = student_of(options, models)
    if student is not None:
        models[student].set_distilled_training(True)
    seed_all(options.run.seed, 'init', 'affine')
    projects = METHODS[options.method].projects(options.own, options.sides)
    try:
        pair = PairWrapper(
            models.get('a'),
            models.get('b'),
            affine_side=getattr(options.own, 'affine_side', 'b'),
            partner_dim=teacher.embed_dim if teacher and projects else None,
            affine=projects,
        )
    except ValueError as e:
        raise UsageError(str(e)) from e
    for side in pair.sides:
        if sync_bn:
            convert_sync_batchnorm(pair.branch(side))  # timm's, which keeps the activation of its own layers
        _freeze(options, pair, side)
    pair.set_inputs(loader_config(configs), configs)
    pair.eval()
    for side, model in models.items():
        try_images(
            partial(pair.run, side), configs[side]['input_size'], f'--model-{side} {options.branches[side].model}')
        if options.branches[side].channels_last:
            model.to(memory_format=torch.channels_last)
            part: Any = pair.parts[side]
            part.memory_format = torch.channels_last
    return pair.to(device)


def _check_models(options, models, sync_bn):
    for side, model in models.items():
        if options.loader.batch_size == 1 and not sync_bn and has_batch_norm(model):
            raise UsageError(f'--batch-size 1: --model-{side} {options.branches[side].model} has BatchNorm, which '
                             f'needs at least 2 images a process')
    if len(models) == 2 and _has_attention(models['a']) and not _has_attention(models['b']):
        _logger.warning(
            f'--model-a {options.branches["a"].model} has attention and --model-b {options.branches["b"].model} has '
            f'none: in the paper the CNN is a and the transformer b; here their roles are swapped')


def create_beside(model_a: Any, name: str, args: Namespace, **kwargs) -> PairWrapper:
    """Create branch b with timm for an existing model, whose images it will share.

    Args:
        model_a: The model, on the CPU.
        name: Name of branch b.
        args: Options of timm's train script.
        **kwargs: Further arguments of timm's `create_model` for branch b.

    Raises:
        UsageError: timm can't build it, or the two cannot be a pair.
    """
    where = f'--model-b {name}'
    source = resolve_data_config(vars(args), model=model_a)
    size = source['input_size']
    kwargs = {**_model_kwargs(args, size[0], model_a.num_classes),
              **size_kwargs(pretrained_cfg_of(name, '--model-b'), size), **kwargs}
    with torch.random.fork_rng(devices=[]), refusing(where, ValueError):  # later draws are as without b
        pair = PairWrapper(model_a, create_named(name, where, **kwargs))
    try_images(pair.eval(), size, where)
    target = {**resolve_data_config(vars(args), model=pair.model_b), 'input_size': size}
    pair.set_inputs(source, {'a': source, 'b': target})
    return pair.train()


def check_pretrained_classes(options: Options, pair: PairWrapper, class_names: list[str] | None) -> None:
    """Warn if a pretrained branch keeps a classifier of as many, but different classes."""
    for side in pair.sides:
        model: Any = pair.branch(side)
        names = model.pretrained_cfg.get('label_names') if options.branches[side].starts_trained else None
        difference = first_difference(names, class_names)
        if len(names or ()) == len(class_names or ()) and difference:
            _logger.warning(
                f'--model-{side} {options.branches[side].model}: its classifier has different classes ({difference}); '
                f'training starts from it anyway')


def first_difference(names: Sequence[str] | dict | None, class_names: list[str] | None) -> str | None:
    """Return the first class whose name differs between a model and the data, None if they agree."""
    names = names_of(names) if isinstance(names, dict) else names
    for i, (known, there) in enumerate(zip(names or (), class_names or (), strict=False)):
        if known != there:
            return f'class {i} is {known!r} in the model and {there!r} in the data'
    return None


def _freeze(options, pair, side):
    depth = options.branches[side].freeze_depth
    if depth:
        if not options.branches[side].starts_trained:
            _logger.warning(f'--freeze-depth-{side} {depth}: freezes untrained layers (no --pretrained)')
        with refusing(f'--freeze-depth-{side}', ValueError):
            pair.freeze(side, depth)


def student_of(options: Options, models: dict[str, Any]) -> str | None:
    """Return the branch that learns by a distillation token, b where both have one; None where the method has none.

    Raises:
        UsageError: No model has a token.
    """
    wanted = METHODS[options.method].distilled(options.own)
    if not wanted:
        return None
    able = [side for side, model in models.items() if side in wanted and hasattr(model, 'set_distilled_training')]
    if not able:
        names = ', '.join(f'--model-{side} {options.branches[side].model}' for side in models)
        raise UsageError(f'--method {options.method}: {names} {no_token()}')
    return able[-1]


@torch.no_grad()
def try_images(forward: Callable, input_size: tuple[int, ...], what: str) -> None:
    """Run a model once on a blank image on the CPU, so that a model that can't take it is reported before the run.

    Raises:
        UsageError: The model can't take it; the message begins with `what`.
    """
    refused = f'{what}: cannot take images of size {tuple(input_size)}'
    with refusing(refused, AssertionError, IndexError, RuntimeError, ValueError):
        forward(torch.zeros(1, *input_size))


def _has_attention(model) -> bool:
    """Return whether a model mixes positions by attention, by the names that timm's modules have."""
    return any(re.search('attn|attention|xca|gpsa', type(module).__name__, re.IGNORECASE) for module in model.modules())


def feature_width(
        pair: PairWrapper,
        teacher: Teacher | None,
        configs: dict[str, dict[str, Any]],
) -> Callable[[str, str], int]:
    """Return a function that gives the channels of a side's feature, by a forward pass of a blank image."""
    @torch.no_grad()
    def width(side: str, name: str) -> int:
        branch, config = (pair.parts[side], configs[side]) if side in pair.sides else (
            teacher.branch, teacher.data_config)  # type: ignore[union-attr]
        if name == EMBED:
            return branch.embed_dim
        branch.tap([name])
        features = branch(torch.zeros(1, *config['input_size'], device=next(branch.parameters()).device))[3]
        branch.tap([])
        return features[name].shape[1]

    return width


def training_flops(task: PairTask, configs: dict[str, dict[str, Any]]) -> int:
    """Return the floating-point operations that training takes for an image, as torch counts them.

    Forward and backward of each branch that learns, with the recomputation of gradient checkpointing; the second
    forward of a branch after its update; the forward of a frozen teacher. Pair terms, optimizer and what skipping
    stochastic depth saves are not counted.

    Args:
        task: The task, not yet distributed.
        configs: Data configuration of each branch.
    """
    pair, refreshed = task.trainable_module, ''.join(task.phases[:-1])
    training = pair.training
    total = 0
    for side in pair.sides:
        forward, both = _count_flops(pair.branch(side).eval(), configs[side]['input_size'])
        total += task.criterion.views * both + forward * refreshed.count(side)
    pair.train(training)
    if task.teacher is not None:
        total += _count_flops(task.teacher.branch.model, task.teacher.data_config['input_size'])[0]
    return total


def _count_flops(model: nn.Module, input_size: tuple[int, ...]) -> tuple[int, int]:
    """Return the operations of one image's forward pass, and of forward and backward."""
    device = next(model.parameters()).device
    # The counter counts attention by its matrix products, but does not support every fused kernel.
    with torch.enable_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        output = model(torch.zeros(1, *input_size, device=device))
        forward = counter.get_total_flops()
        outputs = output if isinstance(output, (tuple, list)) else [output]
        learning = [x.sum() for x in outputs if x.requires_grad]
        if learning:
            sum(learning).backward()
    model.zero_grad(set_to_none=True)
    return forward, counter.get_total_flops()
