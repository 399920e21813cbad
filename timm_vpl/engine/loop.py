"""The loop: train and validate epoch by epoch, and save."""
import logging
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from timm.utils import distribute_bn

from ..core.processes import Processes
from ..data.images import StreamImages
from ..data.loaders import create_eval_loaders
from ..data.sources import Part
from ..errors import RunError, Stopped
from ..options.train import resume_command
from . import peers
from .control import GIVE_UP, GO_ON, SAVE, STOP
from .device import from_all
from .evaluate import evaluate, gate_accuracies, likenesses, outputs_of, pair_figures
from .log import Clock, epoch_costs, epoch_line, epoch_terms, log_result, save_images, stage_of, write_summary
from .optim import branch_lrs
from .resume import run_state
from .run import Run
from .step import Progress

_logger = logging.getLogger('train')


def fit(run: Run) -> None:
    """Train and validate from the current position to the end, saving each epoch.

    Raises:
        RunError: A number was not finite, or the last epoch could not be saved.
        Stopped: A signal came; the run is saved.
    """
    if run.scheduler is not None and run.progress.epoch > 0:
        run.scheduler.step(run.progress.epoch)
        run.scheduler.step_update(run.num_updates)
    write_summary(run)
    started = time.time()
    if run.progress.epoch >= run.end_epoch:
        _logger.info(f'Nothing to train: the next epoch would be {run.progress.epoch}, but the run ends with epoch '
                     f'{run.end_epoch - 1}')
    while run.progress.epoch < run.end_epoch:
        completed = run.progress.epoch + 1
        evaluated = completed == run.end_epoch or completed % run.options.run.val_interval == 0
        run.task.set_epoch(run.progress.epoch)
        if run.progress.batch < len(run.loader_train):
            decision = train_one_epoch(run)
            share_statistics(run, evaluated)
            # Here, since a run that resumes from this position continues with validation.
            handle_decision(run, max(decision, SAVE) if run.options.run.recovery_interval else decision)
        end_epoch(run, evaluated)
    if run.saver is None:
        return
    log_result(run, time.time() - started)
    if run.saver.failed:
        raise RunError(f'--output {run.output_dir}: the last epoch could not be saved, see above')
    run.control.watch()
    run.notify('end')


def train_one_epoch(run: Run) -> int:
    """Train the rest of the present epoch, and track it in `run.progress`.

    Returns:
        The decision of the processes after the last update, for the caller to handle.
    """
    progress, loader, first_batch, skipped = run.progress, run.loader_train, run.progress.batch, run.progress.skipped
    clock, decision = Clock(run), GO_ON
    progress.lrs = progress.lrs or branch_lrs(run.optimizer)
    run.task.train()
    run.optimizer.zero_grad()
    batches = loader.epoch(progress.epoch, first_batch)
    for _, *batch in run.control.awaited(batches, loader.images.being_read):
        watch(run)
        stepped = run.update(progress, *batch)
        if stepped:
            progress.skipped = skipped + loader.skipped
            run.task.update_ema(step=run.num_updates)
            if run.scheduler is not None:
                run.scheduler.step_update(run.num_updates)
        clock.tick()
        if stepped:
            is_last = progress.batch == len(loader)
            run.notify('updated')
            look(run, clock, batch[0])
            decision = decide(run)
            if not is_last:
                handle_decision(run, decision)
    if hasattr(run.optimizer, 'sync_lookahead'):
        run.optimizer.sync_lookahead()
    if progress.batch == first_batch:
        raise RunError('data: the training loader gave no batch')
    return decision


def watch(run: Run) -> None:
    """Measure the update of the next batch, if it will be logged."""
    asked, done = run.options.run, run.progress.batch // run.options.optimizer.grad_accum_steps
    terms = asked.log_grad_terms and (run.progress.epoch * run.updates_per_epoch + done) % asked.log_grad_terms == 0
    looked_at = terms or done % asked.log_interval == 0 or done + 1 == run.updates_per_epoch
    run.update.measures = run.saver is not None and looked_at
    run.update.measures_terms = bool(terms)  # by all processes together


def look(run: Run, clock: Clock, input: torch.Tensor) -> None:
    """Log an update, if it is due: only here does the host wait for the device."""
    if not run.update.measures:
        return
    seconds, waited = clock.averages()
    criterion = run.task.criterion
    run.notify('log', {
        **run.update.read(run.progress),
        **{f'weight_{term.name.removesuffix("_loss")}': criterion.weight_of(term) for term in criterion.all_terms},
        **{f'lr_{side}': lr for side, lr in branch_lrs(run.optimizer).items()},
        'images_per_second': run.options.loader.batch_size * run.processes.world_size / seconds,
        'seconds': seconds,
        'data_seconds': waited,
        **({'stage': stage} if (stage := stage_of(run)) else {}),
        **({'memory': torch.cuda.max_memory_allocated() / 2**20} if run.device.type == 'cuda' else {}),
    })
    if run.options.run.save_images:
        save_images(run, input)


def decide(run: Run) -> int:
    """Return what the processes decide after an update."""
    decision = run.control.decide(GIVE_UP if run.update.error else GO_ON)
    due = run.options.run.recovery_interval and run.num_updates % run.options.run.recovery_interval == 0
    return max(decision, SAVE) if due else decision


def handle_decision(run: Run, decision: int, reads: str = '') -> None:
    """Handle a decision of the processes.

    Args:
        run: The run.
        decision: The decision.
        reads: What is read for the batch that a stalled run awaits.

    Raises:
        RunError: A loss or gradient was not finite.
        Stopped: A signal came; the run is saved.
    """
    if decision == GO_ON:
        return
    if decision >= GIVE_UP:
        check_finite(run)
    saved = save_recovery(run)
    if decision >= STOP:
        raise Stopped(stop_line(run, decision - STOP, saved, reads), decision - STOP)


def stop_line(run: Run, number: int, saved: bool, reads: str) -> str:
    """Return the message of a run that a signal has stopped."""
    progress, torchrun = run.progress, ' (under torchrun, as before)' if run.processes.distributed else ''
    kept = '' if saved else 'NOT saved, older checkpoints are kept'
    if run.saver is not None and not saved and run.saver.newest:
        kept += f', the newest is {run.saver.newest}'
    go_on = f'to resume{torchrun}: {resume_command(run.options, run.output_dir)}' if run.output_dir else ''
    return (f'stopped by {signal.Signals(number).name} after epoch {progress.epoch}, batch {progress.batch} of '
            f'{len(run.loader_train)}{reads}; {"; ".join(filter(None, [kept, go_on]))}')


def stop_here(run: Run, reads: str) -> None:
    """Stop a run whose next batch does not come, if all processes have stalled here.

    Raises:
        Stopped: If this returns at all; else the control ends the process.
    """
    run.update.abandon(run.progress)
    handle_decision(run, run.control.decide_here(), reads)


def give_up(run: Run, number: int, reads: str) -> None:
    """End a run that a signal cannot stop, since a batch does not come and not all processes stall in time."""
    line = f'{run.options.command[0]}: {stop_line(run, number, False, reads)}'
    peers.end(peers.fail(line, 128 + number))


def save_recovery(run: Run) -> bool:
    """Save within an epoch and return in all processes whether that succeeded."""
    check_finite(run)
    state = run_state(run)
    saved = run.saver is not None and run.saver.save_recovery(run.progress.epoch, run.progress.batch, state)
    run.control.saved()
    return from_all(run.processes, saved)[0]


@torch.no_grad()
def check_finite(run: Run) -> None:
    """Raise RunError if this process has seen a number that was not finite; each process checks before each save."""
    run.update.read(run.progress)
    error = run.update.error
    if error is None:
        named = [*run.pair.named_parameters(), *run.task.criterion.named_parameters()]
        names, parameters = zip(*named, strict=True)
        finite = torch.stack([parameter.isfinite().all() for parameter in parameters]).tolist()
        bad = [name for name, good in zip(names, finite, strict=True) if not good]
        if bad:  # by a finite gradient that was too large
            error = f'epoch {run.progress.epoch}: not finite: {bad[0]} and {len(bad) - 1} other parameters'
    if error is not None:  # before all processes exchange what they save
        raise RunError(f'{error}; nothing of it is saved, older checkpoints are unchanged')


def share_statistics(run: Run, evaluated: bool) -> None:
    """Give all processes the same running statistics, as --dist-bn says."""
    processes, mode = run.processes, run.options.batch_norm.dist_bn
    if processes.distributed and mode:
        for ema in (False, True)[:1 + (evaluated and run.evaluates_ema)]:
            distribute_bn(run.task.get_eval_model(ema=ema), processes.world_size, mode == 'reduce')


def end_epoch(run: Run, evaluated: bool) -> None:
    """Validate if it is due, save, and go to the next epoch."""
    epoch, saver = run.progress.epoch, run.saver
    check_finite(run)
    row = {'epoch': epoch, **epoch_terms(run)}
    trained = time.time()
    metrics = validate(run) if evaluated else {}
    if run.loader_gate is not None:
        run.task.criterion.accuracies = gate_accuracies(
            run.task, run.loader_gate, run.device, run.autocast, run.processes.distributed, partial(awaited, run))
    skipped = run.progress.skipped + (int(run.loader_eval.dataset.replaced.sum()) if evaluated else 0)
    if run.scheduler is not None:
        run.scheduler.step(epoch + 1)
    row.update((f'eval_{name}', metrics.get(name, '')) for name in run.columns)
    row.update(epoch_costs(run, sum(from_all(run.processes, skipped)), time.time() - trained))
    run.rows.append(row)
    run.progress = Progress(epoch + 1)
    state = run_state(run)
    run.control.saved()
    if saver is None:
        return
    _logger.info(epoch_line(run, row))
    if row['skipped']:
        is_stream = isinstance(run.loader_eval.dataset, StreamImages)
        then = 'they were left out' if is_stream else 'others replaced them'
        _logger.warning(f"Epoch {epoch}: {row['skipped']} images could not be read, {then}")
    ranked = {'model_best': metrics.get(run.options.run.eval_metric)}
    ranked.update((f'best_{side}', value) for side, value in branch_metrics(run, metrics).items())
    saver.save(epoch, {**state, 'metrics': dict(metrics)}, ranked)
    if not (saver.failed and epoch + 1 == run.end_epoch):
        run.notify('validated', row)
        write_summary(run)  # last: without its row the run is not finished


def try_validation(run: Run) -> None:
    """Evaluate the first validation images, so that errors show before the first epoch.

    They are read in this process, without drawing from its generators. Images of a stream can't be read twice.
    """
    loader, images = run.options.loader, run.loader_eval.dataset
    if isinstance(images, StreamImages) or run.progress.epoch >= run.end_epoch:
        return
    count = min(len(images), loader.validation_batch_size or loader.batch_size)
    first = replace(images, reader=Part(images.reader, range(count)))
    batches = create_eval_loaders(replace(loader, workers=0), first, run.configs, Processes(run.device))
    with torch.random.fork_rng(devices=[]):
        evaluate_pair(run, batches)


def evaluate_pair(run: Run, loader: Any, ema: bool = False, **kwargs: Any) -> dict[Any, dict[str, Any]]:
    """Evaluate the pair, or its EMA, in one pass over a loader; `kwargs` are further arguments of `evaluate`."""
    model: Any = run.task.get_eval_model(ema=ema)
    return evaluate(
        partial(pair_figures, model.eval(), run.pair.sides, run.pair.affine is not None),
        outputs_of(run.pair.sides), loader, run.device, run.autocast, means=likenesses(run.pair), **kwargs)


def awaited(run: Run, loader: Any) -> Iterator:
    """Yield the batches of a validation loader, so that a signal ends the wait for one."""
    return run.control.awaited(loader, loader.dataset.being_read)


def validate(run: Run) -> dict[str, Any]:
    """Evaluate the pair, and its EMA, each in one pass over the data.

    Returns:
        Metrics by column name; 'top1' is the mean of the branches, of their EMA where there is one.
    """
    metrics: dict[str, Any] = {}
    for ema in (False, True)[:1 + run.evaluates_ema]:
        found = evaluate_pair(
            run, run.loader_eval, ema, distributed=run.processes.distributed,
            awaited=partial(awaited, run),
            after_batch=lambda: handle_decision(run, run.control.decide()))
        prefix = 'ema_' if ema else ''
        for output, figures in found.items():
            metrics.update((f'{prefix}{output}' if metric == 'mean' else f'{prefix}{metric}_{output}', figures[metric])
                           for metric in ('mean', 'loss', 'top1', 'top5') if metric in figures)
    bad = [name for name, value in metrics.items() if 'loss' in name and not math.isfinite(value)]
    if bad:
        _logger.warning(f'Epoch {run.progress.epoch}: not finite: {", ".join(bad)}; it is not a best epoch for them')
    branches = branch_metrics(run, metrics)
    metrics['top1'] = sum(branches.values()) / len(branches)
    return metrics


def branch_metrics(run: Run, metrics: dict[str, Any]) -> dict[str, float]:
    """Return each branch's top-1, of its EMA where there is one."""
    prefix = 'ema_' if run.evaluates_ema else ''
    return {side: metrics[f'{prefix}top1_{side}'] for side in run.pair.sides} if metrics else {}
