"""How far a run is: bars on a terminal, lines elsewhere."""
import contextlib
import logging
from typing import Any

from ..bars import bar
from ..engine.log import seconds_left, show_time, stage_of

_logger = logging.getLogger('train')

_FORMAT = '{desc} |{bar:8}| {n_fmt}/{total_fmt}{postfix}'


def _terms(figures: dict[str, float]) -> str:
    return '  '.join(f'{name.removesuffix("_loss")} {value:#.4g}' for name, value in figures.items()
                     if name.endswith('loss'))


class Lines:
    """Logs each update that is looked at on a line, as timm's script does, with the time that is left of the run."""

    def log(self, run, figures: dict[str, float]) -> None:
        """Log the mean losses of an update."""
        batch, batches = run.progress.batch, len(run.loader_train)
        lrs = ' '.join(f'{side} {figures[f"lr_{side}"]:.3e}' for side in run.pair.sides)
        _logger.info(
            f'Train: {run.progress.epoch} [{batch - 1:>4d}/{batches} ({100 * batch / batches:>3.0f}%)]  '
            f'{_terms(figures)}  Time: {figures["seconds"]:.3f}s, {figures["images_per_second"]:>7.2f}/s  '
            f'LR: {lrs}  Data: {figures["data_seconds"]:.3f}s  Left: {show_time(seconds_left(run))}')


class Bars:
    """Draws a bar of the epoch and one of the run on a terminal; log lines stand above them."""

    def start(self, run) -> None:
        """Draw them, as far as the run has come."""
        self._closing = contextlib.ExitStack()
        self._epoch = self._closing.enter_context(bar(
            'Epoch', 'updates', run.updates_per_epoch, initial=run.num_updates % run.updates_per_epoch, position=0,
            bar_format=_FORMAT))
        self._run = self._closing.enter_context(bar(
            'Run', 'epochs', run.end_epoch, initial=run.progress.epoch, position=1, bar_format=_FORMAT))
        self._begin_epoch(run)

    def _begin_epoch(self, run) -> None:
        stage = stage_of(run)
        self._epoch.set_description_str(f'Epoch {run.progress.epoch}' + (f', stage {stage}' if stage else ''))

    def updated(self, run) -> None:
        """Move the bar of the epoch."""
        if self._epoch.n == 0:
            self._begin_epoch(run)
        self._epoch.update()

    def log(self, run, figures: dict[str, float]) -> None:
        """Show the mean losses of an update, the pace, and the time that is left."""
        waiting = 100 * figures['data_seconds'] / figures['seconds']
        self._epoch.set_postfix_str(
            f'{_terms(figures)}  {figures["images_per_second"]:.0f} images/s, data {waiting:.0f} %')
        self._show_left(run)

    def validated(self, run, row: dict[str, Any]) -> None:
        """Move the bar of the run, and show the accuracies."""
        self._epoch.reset()
        if row['eval_top1'] != '':
            self._top1 = '  top-1 ' + '  '.join(f'{side} {row[f"eval_top1_{side}"]:.2f}' for side in run.pair.sides)
        self._run.update()
        self._show_left(run)

    def _show_left(self, run) -> None:
        self._run.set_postfix_str(f'left {show_time(seconds_left(run))}{self._top1}')

    def close(self, run) -> None:
        """Remove them."""
        self._closing.close()

    _top1 = ''
