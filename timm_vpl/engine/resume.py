"""Going on: what a run saves of itself beside weights and optimizer, and how it continues from that exactly."""
import logging
import os
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch

from ..data.identity import data_changes
from ..errors import RunError, UsageError, first_line
from ..options.options import changed_options
from .checkpoint import newest_checkpoint, read_checkpoint

_logger = logging.getLogger('train')


@dataclass
class Progress:
    """How far a run has come: the present epoch, and of it what this process has done."""
    epoch: int = 0
    batch: int = 0  # batches done
    sums: dict[str, torch.Tensor] = field(default_factory=dict)  # of each loss term over them
    skipped: int = 0  # unreadable images
    seconds: float = 0.
    lrs: dict[str, float] = field(default_factory=dict)  # of each branch, at its start


def find_checkpoint(args, restarted: bool = False) -> str:
    """Return the checkpoint to go on from, '' for none; called by one process.

    It is that of --resume; with --resume auto or a folder, and where torchrun has restarted the processes, the newest
    one of the run's folder.

    Args:
        args: Options.
        restarted: Whether torchrun has restarted a process of the run.
    """
    if restarted and not args.experiment:
        _logger.warning(
            'Restarted by torchrun, from the beginning: only a run with --experiment NAME goes on by itself')
    folder = os.path.join(args.output, args.experiment)
    if int(os.environ.get('TORCHELASTIC_MAX_RESTARTS', 0)):
        if os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True':
            # Its store keeps the addresses of processes that have ended, which a restart then tries to reach.
            _logger.warning('torchrun --max-restarts: start torchrun with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, or the '
                            'processes of a restart will not find each other')
        if args.experiment and not args.resume:
            args.resume_auto = True  # a restart could not tell an older run of this name from its own
    if not args.resume_auto and not (restarted and args.experiment):
        return args.resume
    path = newest_checkpoint(folder)
    if path is None and args.resume not in ('', 'auto') and args.resume_auto:
        raise UsageError(f'--resume {args.resume}: no checkpoint in this folder')
    _logger.info(f'--resume auto: {path}' if path else f'--resume auto: nothing to resume in {folder}, a fresh start')
    if path is None:
        return '' if args.resume_auto else args.resume
    if restarted:
        # These held for the first start, which has saved since.
        args.start_epoch, args.no_resume_opt = None, False
    args.resume_auto = True
    return path


def load_checkpoint(args) -> dict[str, Any]:
    """Return the checkpoint of --resume.

    Raises:
        RunError: It can't be read, or lacks what a run needs to go on.
    """
    if not os.path.exists(args.resume):
        raise RunError(f'--resume {args.resume}: not there for process {args.rank}; all machines read the same folder')
    checkpoint = read_checkpoint(args.resume)
    missing = [key for key, needed in (
        ('epoch', args.start_epoch is None), ('optimizer', not args.no_resume_opt)) if needed and key not in checkpoint]
    if missing:
        raise RunError(
            f'--resume {args.resume}: holds weights, but no {" and no ".join(missing)}; --no-resume-opt and '
            f'--start-epoch N go on without')
    return checkpoint


def resume(run, checkpoint: dict[str, Any], options: dict[str, Any]) -> None:
    """Restore a run from a checkpoint, but for what each process has of its own.

    Args:
        run: The run, as built.
        checkpoint: The checkpoint.
        options: Options as given.

    Raises:
        RunError: The checkpoint is one of other models.
        UsageError: The run would not be the one that it was.
    """
    args, task = run.args, run.task
    own = [dict(group) for group in run.optimizer.param_groups]
    try:
        _check_same_run(run, checkpoint, options)
        task.load_checkpoint_state(checkpoint['state_dict'], task_state=checkpoint.get('task_state'))
        if task.has_ema():
            task.load_checkpoint_state(checkpoint.get('state_dict_ema', checkpoint['state_dict']), ema=True)
        if not args.no_resume_opt:
            # How an optimizer computes is not part of the run; what a restart by hand gives holds.
            keys = ['fused', 'foreach', *(['lr'] if run.scheduler is None else [])]
            if args.start_epoch is not None:
                keys += ['lr', 'initial_lr', 'lr_scale', 'weight_decay', 'betas', 'eps', 'momentum']
            uniform = type(run.optimizer).__module__.startswith('torch.optim.')
            run.optimizer.load_state_dict(_adapted(checkpoint['optimizer'], own, keys, uniform))
            if run.scaler.is_enabled() and 'amp_scaler' in checkpoint:
                run.scaler.load_state_dict(checkpoint['amp_scaler'])
            if checkpoint.get('scheduler') and hasattr(run.scheduler, 'lr_scheduler'):
                run.scheduler.lr_scheduler.load_state_dict(checkpoint['scheduler']['plateau'])
                run.scheduler.restore_lr = checkpoint['scheduler']['restore_lr']
        place = checkpoint.get('progress') or {}
        run.progress = Progress(
            checkpoint.get('epoch', -1) + 1, place.get('batch', 0), seconds=place.get('seconds', 0.),
            lrs=place.get('lrs', {}))
        whole = isinstance(run.progress.epoch, int) and isinstance(run.progress.batch, int)
        if not (whole and run.progress.epoch >= 0 <= run.progress.batch <= len(run.loader_train)):
            raise ValueError(f'it stands at epoch {run.progress.epoch}, batch {run.progress.batch}')
        run.rows = [row for row in checkpoint.get('summary', []) if row['epoch'] < run.progress.epoch]
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as e:
        raise RunError(f'--resume {args.resume}: does not fit this pair ({first_line(e)})') from e
    if args.start_epoch is not None:
        run.progress = Progress(args.start_epoch)
        run.rows = [row for row in run.rows if row['epoch'] < args.start_epoch]
    _logger.info(
        f'Resumed {args.resume}: goes on with epoch {run.progress.epoch}, batch {run.progress.batch} of '
        f'{len(run.loader_train)}')


def _adapted(saved: dict[str, Any], own: list[dict], keys: list[str], uniform: bool) -> dict[str, Any]:
    """Return an optimizer's saved state for groups that keep some settings of their own.

    The state of a parameter gets its memory layout, which fused kernels go by.

    Args:
        saved: The saved state_dict.
        own: The optimizer's groups.
        keys: Settings that they keep.
        uniform: Whether each parameter must have state of the same kinds, as for torch's optimizers.

    Raises:
        ValueError: The state does not fit the groups.
    """
    groups = [
        {**group, **{key: given[key] for key in keys if key in given}}
        for group, given in zip(saved['param_groups'], own, strict=True)]
    parameters = dict(zip(
        chain.from_iterable(group['params'] for group in groups),
        chain.from_iterable(group['params'] for group in own),
        strict=True))
    state = {
        i: {key: torch.empty_like(parameters[i], dtype=value.dtype, device=value.device).copy_(value)
            if isinstance(value, torch.Tensor) and value.shape == parameters[i].shape else value
            for key, value in values.items()}
        for i, values in saved['state'].items()}
    kinds = {
        tuple((key, isinstance(value, torch.Tensor)) for key, value in sorted(values.items()))
        for values in state.values() if values}
    if uniform and len(kinds) > 1:
        raise ValueError('its optimizer has not the same state for each parameter')
    return {**saved, 'param_groups': groups, 'state': state}


def _check_same_run(run, checkpoint, options):
    """Refuse what would make a continued run another one, warn of what changes its course."""
    args = run.args
    then = checkpoint.get('run', {})
    processes, batch_size = then.get('processes'), checkpoint['args'].get('batch_size') if then else None
    # A checkpoint of timm's own script has options of another kind.
    refused, warned = changed_options(checkpoint['args'], options, args.sides) if then else ([], [])
    if processes and batch_size:
        before, now = processes * batch_size, args.world_size * args.batch_size
        line = f'{processes} processes x batch {batch_size} before, now {args.world_size} x {args.batch_size}'
        if before != now:
            refused.append(line)
        elif processes != args.world_size:
            warned.append(f'{line}: the same batches, but other BatchNorm statistics and random draws')
    others = _check_data(run, checkpoint)
    accepted = args.accept_data_change and not (checkpoint.get('progress') or {}).get('batch')
    (warned if accepted else refused).extend(others)
    for name, value in (('batches an epoch', len(run.loader_train)), ('epochs in all', run.num_epochs)):
        if then.get(name, value) != value and not (refused or others):  # else that is why
            refused.append(f'{then[name]} {name} before, now {value}')
    if refused == others and others and args.start_epoch is None:
        raise UsageError(f'--resume {args.resume}: {"; ".join(others)}; --accept-data-change goes on with them from a '
                         f'checkpoint at the end of an epoch')
    if refused and args.start_epoch is None:
        raise UsageError(
            f'--resume {args.resume}: not the run that it was: {"; ".join(refused)}; a run goes on as it began '
            f'(--start-epoch {checkpoint.get("epoch", -1) + 1} restarts by hand with other options)')
    for line in refused + warned:
        _logger.warning(f'--resume: changed: {line}')


def _check_data(run, checkpoint: dict[str, Any]) -> list[str]:
    """Return in what the images are not those of the checkpoint, which the run's record of them keeps.

    Raises:
        UsageError: The classes are others, so that labels would mean something else.
    """
    lines = []
    for role, then in checkpoint.get('data', {}).items():
        now = run.data[role]
        changes = data_changes(then, now)
        if 'classes' in changes:
            raise UsageError(f'--resume {run.args.resume}: {role} data: {changes["classes"]}; the weights have learnt '
                             f'the classes of before')
        if changes:
            lines.append(f'{role} data: {next(iter(changes.values()))}')
        earlier = [*then.get('earlier', ()), *([then['files']] if changes else ())]
        if earlier:
            now['earlier'] = earlier
    return lines


def restore_ranks(run, checkpoint: dict[str, Any]) -> None:
    """Give each process what it had of its own; where their number has changed, the mean of all."""
    rows = checkpoint.get('ranks')
    if rows is None:
        return
    if len(rows) == run.args.world_size:
        own = rows[run.args.rank]
    else:
        own = rows.mean(dim=0)
        own[-1] = rows[:, -1].sum() if run.args.rank == 0 else 0
    *statistics, sums, skipped = own.split([
        *(buffer.numel() for buffer in run.statistics), len(checkpoint['progress']['terms']), 1])
    for buffer, values in zip(run.statistics, statistics, strict=True):
        buffer.copy_(values.view_as(buffer))
    run.progress.sums = dict(zip(checkpoint['progress']['terms'], sums.to(run.device), strict=True))
    run.progress.skipped = int(skipped)


def run_state(run) -> dict[str, Any]:
    """Return what a checkpoint needs, beside weights and optimizer, to go on exactly; all processes call it."""
    args, progress = run.args, run.progress
    if args.zero and args.distributed:
        run.optimizer.consolidate_state_dict()  # for the first process to save
    own = torch.cat([
        *(buffer.flatten().to(run.device) for buffer in run.statistics),
        *(total[None] for total in progress.sums.values()),
        torch.tensor([progress.skipped], device=run.device),
    ]).float()
    rows = [own]
    if args.distributed:
        rows = [torch.empty_like(own) for _ in range(args.world_size)] if args.rank == 0 else None
        torch.distributed.gather(own, rows)
    plateau = getattr(run.scheduler, 'lr_scheduler', None)
    return {
        'progress': {
            'batch': progress.batch,
            'seconds': progress.seconds,
            'lrs': progress.lrs,
            'terms': list(progress.sums),
        },
        'ranks': torch.stack(rows).cpu() if rows else None,
        'run': {
            'processes': args.world_size, 'batches an epoch': len(run.loader_train), 'epochs in all': run.num_epochs},
        'scheduler': plateau and {'plateau': plateau.state_dict(), 'restore_lr': run.scheduler.restore_lr},
        'data': run.data,
        'summary': run.rows,
    }
