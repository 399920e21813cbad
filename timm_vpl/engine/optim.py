"""Optimizer, schedule and criterion of a run, from its options."""
import contextlib
import logging
from argparse import Namespace
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from timm.loss import create_classification_loss
from timm.optim import (
    create_optimizer_v2,
    get_optimizer_class,
    get_optimizer_info,
    list_optimizers,
    optimizer_kwargs,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from ..compat import let_scaler_skip
from ..core.criterion import StagedLoss
from ..core.losses import WeightedCrossEntropy
from ..core.methods import METHODS, Setting
from ..core.pair import PairWrapper
from ..core.seeding import seed_all
from ..errors import UsageError
from ..options.parser import did_you_mean, show
from ..options.sections import Optimizer
from ..options.train import Options
from .boundary import refusing

_logger = logging.getLogger(__name__)


def learning_rates(options: Options, world_size: int) -> dict[str, float]:
    """Return each branch's learning rate: the given one, or its base scaled to the global batch by timm's rule."""
    global_batch = options.loader.batch_size * world_size * options.optimizer.grad_accum_steps
    ratio = global_batch / options.schedule.lr_base_size
    adaptive = any(name in options.optimizer.opt.lower() for name in ('ada', 'lamb'))
    scale = options.schedule.lr_base_scale or ('sqrt' if adaptive else 'linear')
    if scale == 'sqrt':
        ratio = ratio ** 0.5
    return {
        side: lr if (lr := options.branches[side].lr) is not None else options.branches[side].lr_base * ratio
        for side in options.sides
    }


def check_optimizer(asked: Optimizer) -> None:
    """Raise UsageError where timm has no such optimizer, its package is missing, or it has another number of betas."""
    name, names = asked.opt.lower().split('_')[-1], list(map(str, list_optimizers()))  # without timm's lookahead_
    if name not in names:
        raise UsageError(f'--opt {asked.opt}: timm has no optimizer of this name{did_you_mean(name, names)}')
    info = get_optimizer_info(name)
    package = info.opt_class.partition('.')[0] if isinstance(info.opt_class, str) else ''
    if package and find_spec(package) is None:
        raise UsageError(f'--opt {asked.opt}: needs the package {package}, which is not installed')
    with refusing(f'--opt {asked.opt}', AssertionError, ImportError):
        get_optimizer_class(name)
    if asked.opt_betas and info.has_betas and len(asked.opt_betas) != info.num_betas:
        raise UsageError(f'--opt-betas {show(asked.opt_betas)}: --opt {asked.opt} has {info.num_betas} betas')


def param_groups(
        options: Options,
        pair: PairWrapper,
        lrs: dict[str, float],
        criterion: StagedLoss | None = None,
) -> list[dict[str, Any]]:
    """Return the optimizer's groups, each with its 'side', each branch's as timm makes them for the model alone.

    The affine layer has the learning rate and weight decay of branch b, or of the only one.
    """
    opt_kwargs = options.optimizer.opt_kwargs
    names = 'fallback_list', 'fallback_no_weight_decay'
    fallback: dict[str, Any] = {key: opt_kwargs[key] for key in names if key in opt_kwargs}
    groups = []
    for side in pair.sides:
        model, branch = pair.branch(side), options.branches[side]
        kwargs = {
            'weight_decay': branch.weight_decay,
            'no_weight_decay_list': getattr(model, 'no_weight_decay', set)(),
            **fallback,
        }
        if branch.layer_decay is None:
            branch_groups = param_groups_weight_decay(model, **kwargs)
        else:
            branch_groups = param_groups_layer_decay(
                model,
                layer_decay=branch.layer_decay,
                min_scale=branch.layer_decay_min_scale or 0.,
                no_opt_scale=branch.layer_decay_no_opt_scale,
                **kwargs,
            )
        if side == pair.sides[-1] and pair.affine is not None:
            branch_groups += param_groups_weight_decay(pair.affine, weight_decay=branch.weight_decay)
        for learner, part in criterion.parts_of(pair.sides) if criterion else ():
            if learner == side:
                branch_groups += param_groups_weight_decay(part, weight_decay=branch.weight_decay)
        groups += [{**group, 'lr': lrs[side], 'side': side} for group in branch_groups]
    return groups


def create_optimizer(
        options: Options,
        pair: PairWrapper,
        lrs: dict[str, float],
        criterion: StagedLoss | None = None,
) -> torch.optim.Optimizer:
    """Create the one optimizer of both branches, and of the layers that terms have.

    Raises:
        UsageError: An unknown optimizer, or options that it does not support.
    """
    asked = options.optimizer
    kwargs = optimizer_kwargs(Namespace(**vars(asked), lr=None, weight_decay=0.))  # the groups have their own
    del kwargs['lr']
    is_adam = asked.opt.removeprefix('lookahead_').lower() in ('adam', 'adamw')
    if is_adam and not {'foreach', 'capturable', 'differentiable'} & set(asked.opt_kwargs):
        kwargs['fused'] = True  # one kernel for all parameters, on a CPU too
    kwargs.update((key, value) for key, value in asked.opt_kwargs.items() if not key.startswith('fallback_'))
    with refusing(f'--opt {asked.opt}', AssertionError, TypeError, ValueError):
        optimizer = create_optimizer_v2(param_groups(options, pair, lrs, criterion), lr=max(lrs.values()), **kwargs)
    if getattr(optimizer, 'is_second_order', False):
        raise UsageError(
            f'--opt {asked.opt}: not available, since fused attention and the gather have no second derivative')
    clips = [key for key in ('max_grad_norm', 'grad_clip_norm') if optimizer.defaults.get(key)]
    if clips and len(pair.sides) > 1 and METHODS[options.method].updates(options.own) == 1:
        _logger.warning(
            f'--opt {asked.opt} clips gradients by one norm over both branches ({clips[0]}='
            f'{optimizer.defaults[clips[0]]}), which couples them; --opt-kwargs {clips[0]}=None and --clip-grad clip '
            f'each branch by its own norm')
    let_scaler_skip(optimizer)
    return optimizer


@contextlib.contextmanager
def only(optimizer: torch.optim.Optimizer, sides: str) -> Iterator[None]:
    """Let the optimizer see the groups of these branches only."""
    groups = optimizer.param_groups
    optimizer.param_groups = [group for group in groups if group['side'] in sides]
    try:
        yield
    finally:
        optimizer.param_groups = groups


def branch_lrs(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return each branch's present learning rate, that of its head where layers have their own."""
    lrs: dict[str, float] = {}
    for group in optimizer.param_groups:
        lrs[group['side']] = max(group['lr'], lrs.get(group['side'], group['lr']))
    return lrs


def create_scheduler(options: Options, optimizer: torch.optim.Optimizer, updates_per_epoch: int):
    """Create the learning rate scheduler and return it (None for --sched none) with the epochs that it runs.

    Raises:
        UsageError: Options that timm's scheduler does not support.
    """
    with refusing(f'--sched {options.schedule.sched}', AssertionError, ValueError):
        kwargs = {**scheduler_kwargs(options.schedule), 'noise_seed': options.run.seed}
        scheduler, num_epochs = create_scheduler_v2(optimizer, **kwargs, updates_per_epoch=updates_per_epoch)
    if scheduler is None:
        for group in optimizer.param_groups:  # timm leaves the scale of a layer to the scheduler
            group['lr'] *= group.get('lr_scale', 1.)
    return scheduler, num_epochs


def schedule_epochs(options: Options, updates_per_epoch: int) -> int:
    """Return the epochs that the learning rate scheduler runs."""
    nothing = torch.optim.SGD([torch.zeros(1)], lr=1.)
    epochs: int = create_scheduler(options, nothing, updates_per_epoch)[1]
    return epochs


def create_criterion(
        options: Options,
        epochs: int,
        device: torch.device,
        student: str | None = None,
        num_classes: int = 0,
        width: Callable[[str, str], int] = lambda side, feature: 0,
        class_weights: torch.Tensor | None = None,
) -> StagedLoss:
    """Create the criterion of --method, on timm's classification loss.

    Args:
        epochs: Number of epochs that the learning rate scheduler runs.
        device: Where the loss is computed.
        class_weights: Weight of each class in the labels' loss.
    """
    asked, base_loss = options.augmentation, None
    if asked.bce_loss or METHODS[options.method].bce:
        base_loss = create_classification_loss(
            'bce',
            smoothing=asked.smoothing,
            soft_targets=asked.mixes,
            bce_target_thresh=asked.bce_target_thresh,
            bce_sum=asked.bce_sum,
            class_weight=class_weights,
            pos_weight=asked.bce_pos_weight,
        )
    elif class_weights is not None:
        base_loss = WeightedCrossEntropy(class_weights, 0. if asked.mixes else asked.smoothing)
    elif asked.smoothing and not asked.mixes:
        base_loss = create_classification_loss('ce', smoothing=asked.smoothing)
    if base_loss is not None:
        base_loss.to(device)  # its class weights
    setting = Setting(options.sides, epochs, base_loss, student, asked.bce_sum, num_classes, width)
    seed_all(options.run.seed, 'init', 'terms')
    with refusing(f'--method {options.method}', ValueError):
        return METHODS[options.method].criterion(options.own, setting)
