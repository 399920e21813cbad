"""Resuming: what a run saves besides weights and optimizer, and how it continues exactly from that."""
import logging
import os
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ..core.processes import Processes
from ..data.identity import data_changes
from ..data.images import StreamImages
from ..errors import RunError, UsageError, first_line
from ..options.checks import is_auto
from ..options.train import Options, changed_options, recipe_values
from .checkpoint import newest_checkpoint, read_checkpoint
from .device import by_first, from_all
from .owner import Owner
from .step import Progress

_logger = logging.getLogger('train')


@dataclass(frozen=True)
class Start:
    """Where a run begins."""
    path: str = ''  # of the checkpoint to resume from
    auto: bool = False  # it continues in its own folder
    epoch: int | None = None  # manual restart at this epoch
    optimizer: bool = True  # resume the state of the optimizer


def find_start(options: Options, processes: Processes, owner: Owner) -> Start:
    """Return where all processes start.

    The checkpoint is that of --resume; with --resume auto or a folder, and where torchrun has restarted the processes,
    the newest one of the run's folder, which belongs to this run from then on.
    """
    # torchrun counts only the restarts for which a process of the same machine has failed.
    restarted = any(from_all(processes, os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') != '0'))
    return by_first(processes, partial(_find_start, options, restarted, owner))


def _find_start(options, restarted, owner):
    if restarted and not options.run.experiment:
        _logger.warning(
            'Restarted by torchrun, from the beginning: only a run with --experiment NAME resumes automatically')
    folder, auto = os.path.join(output_of(options), options.run.experiment), is_auto(options.run.resume)
    if int(os.environ.get('TORCHELASTIC_MAX_RESTARTS', 0)):
        if os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True':
            # Its store keeps the addresses of ended processes, which a restart then tries to reach.
            _logger.warning(
                'torchrun --max-restarts: start torchrun with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, or the restarted '
                'processes cannot connect to each other')
        if options.run.experiment and not options.run.resume:
            auto = True  # a restart could not distinguish an older run of this name from its own
    by_hand = Start(options.run.resume, auto, options.run.start_epoch, not options.run.no_resume_opt)
    if not auto and not (restarted and options.run.experiment):
        return by_hand
    owner.claim(folder)
    path = newest_checkpoint(folder)
    if path is None and options.run.resume not in ('', 'auto') and auto:
        raise UsageError(f'--resume {options.run.resume}: no checkpoint in this folder')
    _logger.info(f'--resume auto: {path}' if path else f'--resume auto: nothing to resume in {folder}, a fresh start')
    if path is None:
        return replace(by_hand, path='') if auto else by_hand
    # The options of a manual restart were for the first start, which has saved since.
    return Start(path, True) if restarted else replace(by_hand, path=path, auto=True)


def output_of(options: Options) -> str:
    """Return the folder of all runs."""
    return options.run.output or 'output/train'


def load_checkpoint(start: Start) -> dict[str, Any]:
    """Return the checkpoint of --resume.

    Raises:
        RunError: It can't be read, or lacks what a run needs to resume.
    """
    if not os.path.exists(start.path):
        raise RunError(f'--resume {start.path}: does not exist for one process; all machines need the same folder')
    checkpoint = read_checkpoint(start.path)
    missing = [key for key, needed in (
        ('epoch', start.epoch is None), ('optimizer', start.optimizer)) if needed and key not in checkpoint]
    if missing:
        raise RunError(
            f'--resume {start.path}: has weights, but no {" and no ".join(missing)}; --no-resume-opt and --start-epoch '
            f'N resume without')
    return checkpoint


def resume(run, checkpoint: dict[str, Any]) -> None:
    """Restore a run from a checkpoint, but for the state of each process.

    Args:
        run: The run, as built.
        checkpoint: The checkpoint.

    Raises:
        RunError: The checkpoint is one of other models.
        UsageError: The run differs from that of the checkpoint.
    """
    task, start = run.task, run.start
    try:
        _check_same_run(run, checkpoint)
        task.load_checkpoint_state(checkpoint['state_dict'], task_state=checkpoint.get('task_state'))
        if task.has_ema():
            task.load_checkpoint_state(checkpoint.get('state_dict_ema', checkpoint['state_dict']), ema=True)
        if start.optimizer:
            _load_optimizer(run, checkpoint)
        run.progress = _place(checkpoint, len(run.loader_train))
        if start.epoch is not None:
            run.progress = Progress(start.epoch)
        run.rows = [row for row in checkpoint.get('summary', []) if row['epoch'] < run.progress.epoch]
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as e:
        raise RunError(f'--resume {start.path}: does not fit this pair ({first_line(e)})') from e
    _logger.info(
        f'Resumed {start.path}: continues with epoch {run.progress.epoch}, batch {run.progress.batch} of '
        f'{len(run.loader_train)}')


def _place(checkpoint, num_batches) -> Progress:
    """Return the progress of a checkpoint, without the state of each process."""
    place = checkpoint.get('progress') or {}
    progress = Progress(
        checkpoint.get('epoch', -1) + 1, place.get('batch', 0), seconds=place.get('seconds', 0.),
        lrs=place.get('lrs', {}))
    whole = isinstance(progress.epoch, int) and isinstance(progress.batch, int)
    if not (whole and progress.epoch >= 0 <= progress.batch <= num_batches):
        raise ValueError(f'its progress is epoch {progress.epoch}, batch {progress.batch}')
    return progress


def _load_optimizer(run, checkpoint):
    # How an optimizer computes is not part of the run; a manual restart keeps its own options.
    keys = ['fused', 'foreach', *(['lr'] if run.scheduler is None else [])]
    if run.start.epoch is not None:
        keys += ['lr', 'initial_lr', 'lr_scale', 'weight_decay', 'betas', 'eps', 'momentum']
    saved = checkpoint['optimizer']
    parameters = {}
    for group, own in zip(saved['param_groups'], run.optimizer.param_groups, strict=True):
        group.update((key, own[key]) for key in keys if key in own)
        parameters.update(zip(group['params'], own['params'], strict=True))
    states = saved['state']
    _check_states(run.optimizer, states, parameters)
    for i, state in states.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameters[i].shape:
                # In the memory layout of the parameter, which fused kernels rely on.
                state[key] = torch.empty_like(parameters[i], dtype=value.dtype, device=value.device).copy_(value)
    run.optimizer.load_state_dict(saved)
    if run.update.scaler is not None and 'amp_scaler' in checkpoint:
        run.update.scaler.load_state_dict(checkpoint['amp_scaler'])


def _check_states(optimizer, states: dict[int, dict[str, Any]], parameters: dict[int, torch.Tensor]) -> None:
    """Raise ValueError if torch's kernels would read beyond a state, or miss one."""
    if not type(optimizer).__module__.startswith('torch.optim.'):
        return
    kinds = {tuple(sorted(state)) for state in states.values() if state}
    fits = all(
        value.shape in ((), parameters[i].shape)
        for i, state in states.items() for value in state.values() if isinstance(value, torch.Tensor))
    tensors = {
        (key, isinstance(value, torch.Tensor)) for state in states.values() for key, value in state.items()}
    if len(kinds) > 1 or not fits or len(tensors) > len({key for key, _ in tensors}):
        raise ValueError('its optimizer does not have the same state for each parameter')


def _check_same_run(run, checkpoint):
    """Refuse changes that would make a resumed run another one, and warn of those that change its course."""
    options, start, world_size = run.options, run.start, run.processes.world_size
    then = checkpoint.get('run', {})
    processes, batch_size = then.get('processes'), checkpoint['args'].get('batch_size') if then else None
    # A checkpoint of timm's own script has options of another kind.
    refused, warned = changed_options(checkpoint['args'], recipe_values(options)) if then else ([], [])
    if processes and batch_size:
        before, now = processes * batch_size, world_size * options.loader.batch_size
        line = f'{processes} processes x batch {batch_size} before, now {world_size} x {options.loader.batch_size}'
        if before != now:
            refused.append(line)
        elif processes != world_size:
            warned.append(f'{line}: the same batches, but other BatchNorm statistics and random draws')
    others = _check_data(run, checkpoint)
    accepted = options.run.accept_data_change and not (checkpoint.get('progress') or {}).get('batch')
    (warned if accepted else refused).extend(others)
    for name, value in _lengths(run).items():
        if then.get(name, value) != value and not (refused or others):  # else that is the reason
            refused.append(f'{then[name]} {name} before, now {value}')
    if refused == others and others and start.epoch is None:
        raise UsageError(
            f'--resume {start.path}: {"; ".join(others)}; --accept-data-change continues with them from a checkpoint '
            f'at the end of an epoch')
    if refused and start.epoch is None:
        raise UsageError(
            f'--resume {start.path}: {"; ".join(refused)}; these cannot change on resume (--start-epoch '
            f'{checkpoint.get("epoch", -1) + 1} restarts with other options)')
    for line in refused + warned:
        _logger.warning(f'--resume: changed: {line}')


def _lengths(run) -> dict[str, Any]:
    found: dict[str, Any] = {'batches an epoch': len(run.loader_train), 'epochs in all': run.num_epochs}
    if run.class_weights is not None:  # of a file, whose name may be the same
        found['class weights'] = run.class_weights.tolist()
    return found


def _check_data(run, checkpoint: dict[str, Any]) -> list[str]:
    """Return the differences of the images from those of the checkpoint; the run's record keeps them.

    Raises:
        UsageError: The classes differ, so the labels have another meaning.
    """
    lines = []
    for role, then in checkpoint.get('data', {}).items():
        now = run.data[role]
        changes = data_changes(then, now)
        if 'classes' in changes:
            raise UsageError(
                f'--resume {run.start.path}: {role} data: {changes["classes"]}; the weights were trained on the old '
                f'classes')
        if changes:
            lines.append(f'{role} data: {next(iter(changes.values()))}')
        earlier = [*then.get('earlier', ()), *([then['files']] if changes else ())]
        if earlier:
            now['earlier'] = earlier
    return lines


def _own_tensors(run) -> list[torch.Tensor]:
    """Return the state of this process: BatchNorm's statistics, of the EMA too, and the sums of the epoch."""
    ema = run.task.get_trainable_module(ema=True)
    modules = [run.pair, *([] if ema is None else [ema.module])]
    sums, kept = run.progress.sums, run.progress.kept
    return [
        *(buffer for module in modules for name, buffer in module.named_buffers()
          if 'running_mean' in name or 'running_var' in name),
        *([] if sums is None else [sums, kept]),
    ]


def restore_ranks(run, checkpoint: dict[str, Any]) -> None:
    """Restore the state of each process; if their number has changed, the mean of all."""
    rows = checkpoint.get('ranks')
    if rows is None:
        return
    if len(rows) == run.processes.world_size:
        row = rows[run.processes.rank]
    else:
        row = rows.mean(dim=0)
        row[-1] = rows[:, -1].sum() if run.processes.rank == 0 else 0
    progress = run.progress
    progress.terms = checkpoint['progress']['terms']
    if progress.terms:
        progress.sums = torch.zeros(len(progress.terms), device=run.device)
        progress.kept = torch.zeros((), device=run.device)
    tensors = _own_tensors(run)
    *parts, skipped = row.split([*(tensor.numel() for tensor in tensors), 1])
    for tensor, values in zip(tensors, parts, strict=True):
        tensor.copy_(values.view_as(tensor))
    progress.skipped = int(skipped)
    if 0 < progress.batch < len(run.loader_train) and isinstance(run.loader_train.images, StreamImages):
        _logger.warning(f'A stream cannot be resumed in mid-epoch: epoch {progress.epoch} starts again')
        run.progress = Progress(progress.epoch)


def run_state(run) -> dict[str, Any]:
    """Return what a checkpoint needs besides weights and optimizer for an exact resume; all processes call it."""
    progress = run.progress
    row = torch.cat([
        *(tensor.flatten().to(run.device) for tensor in _own_tensors(run)),
        torch.tensor([progress.skipped], device=run.device),
    ]).float().cpu()
    return {
        'progress': {key: getattr(progress, key) for key in ('batch', 'seconds', 'lrs', 'terms')},
        'ranks': torch.stack(from_all(run.processes, row)),
        'run': {'processes': run.processes.world_size, **_lengths(run)},
        'data': run.data,
        'summary': run.rows,
    }
