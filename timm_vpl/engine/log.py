"""The log of a run: its plan, its epochs, its result, and summary.csv; its speed."""
import csv
import logging
import math
import os
import shutil
import time
from datetime import timedelta
from typing import Any

import torch
import torchvision

from ..errors import first_line
from ..files import replacing
from ..options.parser import show
from .evaluate import outputs_of
from .optim import learning_rates

_logger = logging.getLogger('train')

SUMMARY = 'summary.csv'


class Clock:
    """Times of an epoch: since it began, also before a stop, of its batches, and of waiting for them."""

    def __init__(self, run):
        self._run, self._before, self._waited = run, run.progress.seconds, run.control.waited
        self._begun = self._end = time.time()
        self._batches = 0

    def tick(self) -> None:
        """Note the end of a batch."""
        self._end = time.time()
        self._batches += 1
        self._run.progress.seconds = self._before + self._end - self._begun

    def averages(self) -> tuple[float, float]:
        """Return the seconds that a batch took, and the seconds of waiting for it."""
        return (self._end - self._begun) / self._batches, (self._run.control.waited - self._waited) / self._batches


def log_plan(run) -> None:
    """Log what a run is about to do, and how much disk space its checkpoints will take."""
    options, processes, criterion = run.options, run.processes, run.task.criterion
    lrs = learning_rates(options, processes.world_size)
    for side in run.pair.sides:
        count = sum(parameter.numel() for parameter in run.pair.branch(side).parameters())
        _logger.info(
            f'Branch {side}: {options.branches[side].model}, {count / 1e6:.2f} M parameters, LR {lrs[side]:.3g}, '
            f'images {" x ".join(map(str, run.configs[side]["input_size"]))}')
    first, last = (run.configs[side] for side in (run.pair.sides[0], run.pair.sides[-1]))
    differing = [f'{key} {show(value)} and {show(last[key])}' for key, value in first.items() if value != last[key]]
    if differing:
        _logger.info(
            f'Validation reads each image twice, since the branches need different images: {", ".join(differing)}')
    if run.pair.affine is not None:
        _logger.info(
            f'Affine layer on side {run.pair.affine_side}: {run.pair.affine.in_features} -> '
            f'{run.pair.affine.out_features}')
    _logger.info(
        f'{run.pair.num_classes} classes, {run.updates_per_epoch} updates an epoch, '
        f'{run.num_epochs} epochs, device {run.device}, {processes.world_size} process(es), '
        f'{torch.get_num_threads()} CPU thread(s)')
    warmup = options.schedule.warmup_epochs
    if 2 * warmup > run.num_epochs and options.schedule.sched != 'none':
        _logger.info(f'--warmup-epochs {warmup} of {run.num_epochs} epochs: the learning rate rises most of the time')
    negatives = options.loader.batch_size * (processes.world_size if getattr(criterion, 'gather', False) else 1)
    if hasattr(criterion, 'gather') and options.optimizer.grad_accum_steps > 1:
        _logger.info(
            f'Gradient accumulation: the contrastive term uses the {negatives} images of a micro-batch, not the '
            f'{negatives * options.optimizer.grad_accum_steps} of an update')
    # Weights, their average, the optimizer's two moments.
    each = sum(tensor.nbytes for tensor in run.pair.state_dict().values()) * (1 + run.task.has_ema())
    each += 2 * sum(parameter.nbytes for parameter in run.pair.parameters() if parameter.requires_grad)
    # History, last, a best for each branch, one being written; recovery checkpoints; milestones.
    files = options.run.checkpoint_hist + 2 + len(run.pair.sides) + len(options.run.save_epochs or ())
    files += 2 * bool(options.run.recovery_interval or options.run.recovery_minutes)
    free = shutil.disk_usage(run.output_dir).free
    _logger.info(
        f'Checkpoints: about {each / 2**20:.0f} MiB each, at most {files} of them, {files * each / 2**30:.2f} GiB in '
        f'{run.output_dir} ({free / 2**30:.0f} GiB free)')
    if files * each > free:
        _logger.warning(
            f'--output {run.output_dir}: the disk may become full; --checkpoint-hist keeps fewer checkpoints')


def seconds_left(run) -> float | None:
    """Return the estimated seconds until the run ends, by its epochs so far; None before its first update."""
    progress, batches, interval = run.progress, len(run.loader_train), run.options.run.val_interval
    rows = [row for row in run.rows if row['seconds']]
    epoch = progress.seconds * batches / progress.batch if progress.batch else rows[-1]['seconds'] if rows else None
    if epoch is None:
        return None
    validation = next((row['eval_seconds'] for row in reversed(rows) if row['eval_top1'] != ''), 0.)
    if progress.epoch == run.end_epoch:  # which is validated, whatever the interval
        return 0.
    validations = math.ceil(run.end_epoch / interval) - progress.epoch // interval
    return (run.end_epoch - progress.epoch - progress.batch / batches) * epoch + validations * validation


def show_time(seconds: float | None) -> str:
    """Return a time as h:mm:ss, '?' if it is not known."""
    return '?' if seconds is None else str(timedelta(seconds=round(seconds)))


def stage_of(run) -> int | None:
    """Return the stage that the present epoch is in, None where the method has none."""
    criterion = run.task.criterion
    return criterion.schedule.stage(run.progress.epoch) if hasattr(criterion, 'stage') else None


def epoch_line(run, row: dict[str, Any]) -> str:
    """Return the line of an epoch: stage, mean losses, accuracies (of the EMA in brackets), times."""
    losses = '  '.join(
        f'{name.removeprefix("train_").removesuffix("_loss")} {value:#.4g}'
        for name, value in row.items() if name.startswith('train_') and value != '')
    parts = [f'Epoch {row["epoch"]} ({row["epoch"] + 1}/{run.end_epoch})']
    if 'stage' in row:
        parts.append(f'stage {row["stage"]}')
    parts.append(losses)
    if row['eval_top1'] != '':
        accuracies = [
            f'{"average" if output == "ens" else output} {row[f"eval_top1_{output}"]:.2f}'
            + (f' ({row[f"eval_ema_top1_{output}"]:.2f})' if run.evaluates_ema else '')
            for output in outputs_of(run.pair.sides)]
        parts.append('top-1 ' + '  '.join(accuracies))
    validated = f' + {row["eval_seconds"]:.1f}' if row['eval_top1'] != '' else ''
    parts.append(f'{row["seconds"]:.1f}{validated} s')
    return '  '.join([*parts, f'left {show_time(seconds_left(run))}'])


def save_images(run, input: torch.Tensor) -> None:
    """Write a batch of images as one; log an error if that fails."""
    name = f'train-batch-{run.progress.batch - 1}.jpg'
    try:
        torchvision.utils.save_image(input, os.path.join(run.output_dir, name), padding=0, normalize=True)
    except OSError as e:
        _logger.error(f'--save-images: {run.output_dir}: {e.strerror or first_line(e)}')


def epoch_terms(run) -> dict[str, Any]:
    """Return the mean of each loss term over the epoch and the processes, '' where it was off."""
    processes, progress = run.processes, run.progress
    means = progress.sums / progress.kept
    if processes.distributed:
        torch.distributed.all_reduce(means)
        means /= processes.world_size
    terms = dict.fromkeys(['loss', *(term.name for term in run.task.criterion.all_terms)], '')
    terms.update(zip(progress.terms, means.tolist(), strict=True))
    return {f'train_{name}': value for name, value in terms.items()}


def epoch_costs(run, skipped: int, eval_seconds: float) -> dict[str, Any]:
    """Return the further columns of the epoch: learning rates, stage, epochs of the whole schedule, images, costs.

    Args:
        run: The run.
        skipped: Images of the epoch, validation included, that could not be read.
        eval_seconds: Time that its validation took.
    """
    processes, progress = run.processes, run.progress
    images = len(run.loader_train) * run.options.loader.batch_size * processes.world_size
    return {
        **{f'lr_{side}': lr for side, lr in progress.lrs.items()},
        **({'stage': stage} if (stage := stage_of(run)) else {}),
        'num_epochs': run.num_epochs,
        'processes': processes.world_size,
        'images': images,
        'flops': images * run.flops,
        'skipped': skipped,
        'seconds': round(progress.seconds, 3),
        'eval_seconds': round(eval_seconds, 3),
        'images_per_second': round(images / progress.seconds, 2),
    }


def write_summary(run) -> None:
    """Write summary.csv, one row per epoch; log an error if that fails."""
    if run.saver is None or not run.rows:
        return
    path = os.path.join(run.output_dir, SUMMARY)
    try:
        with replacing(path, newline='') as f:
            writer = csv.DictWriter(f, fieldnames=run.rows[-1].keys(), restval='', extrasaction='ignore')
            writer.writeheader()
            writer.writerows(run.rows)
    except OSError as e:
        _logger.error(f'{path}: cannot be written ({e.strerror}); the next saved checkpoint contains its rows')


def log_result(run, seconds: float) -> None:
    """Log the result of each branch, and where its checkpoint is."""
    metrics: dict[str, Any] = next((row for row in reversed(run.rows) if row['eval_top1'] != ''), {})
    _logger.info(f'Trained in {seconds:.0f} s.')
    bests = run.saver.ranks.bests
    for side in run.pair.sides:
        if f'best_{side}' not in bests:
            continue
        best, epoch = bests[f'best_{side}']
        columns = {'top-1': f'eval_top1_{side}', 'EMA': f'eval_ema_top1_{side}'}
        last = ', '.join(f'{name} {metrics[column]:.2f} %' for name, column in columns.items() if column in metrics)
        _logger.info(
            f'Branch {side} ({run.options.branches[side].model}): {last}; best {best:.2f} % at epoch {epoch}: '
            f'{os.path.join(run.output_dir, f"best_{side}.pth.tar")}')
    if 'model_best' in bests:
        best, epoch = bests['model_best']
        _logger.info(f'*** Best metric: {best:.4g} (epoch {epoch})')
    _logger.info(f'Checkpoints, {SUMMARY} and args.yaml: {run.output_dir}')
