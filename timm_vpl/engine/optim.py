"""Optimizer, schedule and criterion of a run, from its options."""
import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from timm.loss import create_classification_loss
from timm.optim import (
    create_optimizer_v2,
    get_optimizer_class,
    optimizer_kwargs,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from ..compat import let_scaler_skip
from ..core.criterion import StagedLoss
from ..core.methods import METHODS, Setting
from ..core.pair import PairWrapper
from ..errors import UsageError
from ..options.options import mixup_active

_logger = logging.getLogger(__name__)


def learning_rates(args) -> dict[str, float]:
    """Return each branch's learning rate: as given, or its base scaled to the global batch by timm's rule."""
    global_batch = args.batch_size * args.world_size * args.grad_accum_steps
    ratio = global_batch / args.lr_base_size
    scale = args.lr_base_scale or ('sqrt' if any(name in args.opt.lower() for name in ('ada', 'lamb')) else 'linear')
    if scale == 'sqrt':
        ratio = ratio ** 0.5
    return {
        side: lr if (lr := getattr(args, f'lr_{side}')) is not None else getattr(args, f'lr_base_{side}') * ratio
        for side in args.sides
    }


def param_groups(args, pair: PairWrapper, lrs: dict[str, float]) -> list[dict[str, Any]]:
    """Return the optimizer's groups, each with its 'side', each branch's as timm makes them for the model alone.

    The affine layer has the learning rate and weight decay of branch b, or of the only one.
    """
    opt_kwargs = args.opt_kwargs or {}
    fallback = {key: opt_kwargs[key] for key in ('fallback_list', 'fallback_no_weight_decay') if key in opt_kwargs}
    groups = []
    for side in pair.sides:
        model = pair.branch(side)
        kwargs = {
            'weight_decay': getattr(args, f'weight_decay_{side}'),
            'no_weight_decay_list': getattr(model, 'no_weight_decay', set)(),
            **fallback,
        }
        layer_decay = getattr(args, f'layer_decay_{side}')
        if layer_decay is None:
            branch_groups = param_groups_weight_decay(model, **kwargs)
        else:
            branch_groups = param_groups_layer_decay(
                model,
                layer_decay=layer_decay,
                min_scale=getattr(args, f'layer_decay_min_scale_{side}') or 0.,
                no_opt_scale=getattr(args, f'layer_decay_no_opt_scale_{side}'),
                **kwargs,
            )
        if side == pair.sides[-1] and pair.affine is not None:
            branch_groups += param_groups_weight_decay(pair.affine, weight_decay=kwargs['weight_decay'])
        groups += [{**group, 'lr': lrs[side], 'side': side} for group in branch_groups]
    return groups


def create_optimizer(args, pair: PairWrapper, lrs: dict[str, float]) -> torch.optim.Optimizer:
    """Create the one optimizer of both branches.

    Raises:
        UsageError: An optimizer that timm does not know, or options that it does not take.
    """
    kwargs = optimizer_kwargs(args)
    for key in ('lr', 'weight_decay', 'layer_decay', 'layer_decay_min_scale', 'layer_decay_no_opt_scale'):
        kwargs.pop(key, None)
    if _has_fused(args.opt) and not {'foreach', 'capturable', 'differentiable'} & set(args.opt_kwargs or {}):
        kwargs['fused'] = True  # one kernel for all parameters, on a CPU too
    kwargs.update({
        key: value for key, value in (args.opt_kwargs or {}).items() if not key.startswith('fallback_')})
    try:
        optimizer = create_optimizer_v2(param_groups(args, pair, lrs), lr=max(lrs.values()), **kwargs)
    except (AssertionError, TypeError, ValueError) as e:
        raise UsageError(f'--opt {args.opt}: {e}') from e
    if getattr(optimizer, 'is_second_order', False):
        raise UsageError(f'--opt {args.opt}: not available, fused attention and the gather have no second derivative')
    clips = [key for key in ('max_grad_norm', 'grad_clip_norm') if optimizer.defaults.get(key)]
    if clips and len(pair.sides) > 1 and METHODS[args.method].updates(args.options.own) == 1:
        _logger.warning(
            f'--opt {args.opt} clips gradients by one norm over both branches ({clips[0]}='
            f'{optimizer.defaults[clips[0]]}), which couples them; --opt-kwargs {clips[0]}=None and --clip-grad clip '
            f'each branch by its own norm')
    let_scaler_skip(optimizer)
    return optimizer


@contextlib.contextmanager
def only(optimizer: torch.optim.Optimizer, sides: str) -> Iterator[None]:
    """Let the optimizer have the groups of these branches alone."""
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


def _has_fused(name: str) -> bool:
    """Return whether an optimizer is one of torch's that has a fused implementation on every device."""
    try:
        optimizer_class = get_optimizer_class(name.removeprefix('lookahead_'), bind_defaults=False)
    except ValueError:
        return False
    return optimizer_class in (torch.optim.Adam, torch.optim.AdamW)


def create_scheduler(args, optimizer: torch.optim.Optimizer, updates_per_epoch: int):
    """Create the learning rate scheduler and return it (None for --sched none) with the epochs that it runs.

    Raises:
        UsageError: Options that timm's scheduler does not take.
    """
    try:
        scheduler, num_epochs = create_scheduler_v2(
            optimizer, **scheduler_kwargs(args), updates_per_epoch=updates_per_epoch)
    except (AssertionError, ValueError) as e:
        raise UsageError(f'--sched {args.sched}: {e}') from e
    if scheduler is None:
        for group in optimizer.param_groups:  # timm leaves the scale of a layer to the scheduler
            group['lr'] *= group.get('lr_scale', 1.)
    return scheduler, num_epochs


def create_criterion(args, epochs: int, device: torch.device) -> StagedLoss:
    """Create the criterion of --method, on timm's classification loss.

    Args:
        epochs: Number of epochs that the learning rate scheduler runs.
        device: Where the loss is computed.
    """
    base_loss = None
    if args.bce_loss or METHODS[args.method].bce:
        base_loss = create_classification_loss(
            'bce',
            smoothing=args.smoothing,
            soft_targets=mixup_active(args),
            bce_target_thresh=args.bce_target_thresh,
            bce_sum=args.bce_sum,
            pos_weight=args.bce_pos_weight,
        )
    elif args.smoothing and not mixup_active(args):
        base_loss = create_classification_loss('ce', smoothing=args.smoothing)
    if base_loss is not None:
        base_loss.to(device)  # its class weights
    setting = Setting(args.sides, epochs, base_loss, getattr(args, 'student', None), args.bce_sum)
    return METHODS[args.method].criterion(args.options.own, setting)
