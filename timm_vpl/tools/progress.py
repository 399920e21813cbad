"""The progress of a run: bars on a terminal, lines elsewhere."""
import contextlib
import logging
from typing import Any

from ..bars import bar
from ..engine.log import seconds_left, show_time, stage_of

_logger = logging.getLogger('train')

_FORMAT = '{desc} |{bar:8}| {n_fmt}/{total_fmt}{postfix}'


def _terms(figures: dict[str, float]) -> list[str]:
    return [f'{name.removesuffix("_loss")} {value:#.4g}' for name, value in figures.items() if name.endswith('loss')]


def _show(shown, parts: list[str]) -> None:
    """Show parts behind a bar, without the last ones if the terminal is too narrow."""
    shown.set_postfix_str('', refresh=False)
    room = (shown.format_dict['ncols'] or 1000) - len(str(shown))
    while parts and len('  '.join(['', *parts])) > room:
        parts = parts[:-1]
    shown.set_postfix_str('  '.join(parts))


class Lines:
    """Logs a line per log interval, as timm's script does, with the time left of the run."""

    def log(self, run, figures: dict[str, float]) -> None:
        """Log the mean losses of an update."""
        batch, batches = run.progress.batch, len(run.loader_train)
        lrs = ' '.join(f'{side} {figures[f"lr_{side}"]:.3e}' for side in run.pair.sides)
        _logger.info(
            f'Train: {run.progress.epoch} [{batch - 1:>4d}/{batches} ({100 * batch / batches:>3.0f}%)]  '
            f'{"  ".join(_terms(figures))}  Time: {figures["seconds"]:.3f}s, {figures["images_per_second"]:>7.2f}/s  '
            f'LR: {lrs}  Data: {figures["data_seconds"]:.3f}s  Left: {show_time(seconds_left(run))}')


class Bars:
    """Draws bars of the epoch and the run and a line of losses on a terminal, below the log lines."""

    _top1: list[str] = []

    def start(self, run) -> None:
        """Draw them at the progress of the run."""
        self._closing = contextlib.ExitStack()
        self._epoch, self._run, self._losses = (
            self._closing.enter_context(bar(what, '', total, initial=done, position=place, bar_format=format))
            for place, (what, total, done, format) in enumerate((
                ('Epoch', run.updates_per_epoch, run.num_updates % run.updates_per_epoch, _FORMAT),
                ('Run', run.end_epoch, run.progress.epoch, _FORMAT), ('', None, 0, '{desc}{postfix}'))))
        self._begin_epoch(run)
        for row in run.rows:
            self._note(run, row)

    def _begin_epoch(self, run) -> None:
        stage = stage_of(run)
        self._epoch.set_description_str(f'Epoch {run.progress.epoch}' + (f', stage {stage}' if stage else ''))

    def updated(self, run) -> None:
        """Move the bar of the epoch."""
        if self._epoch.n == 0:
            self._begin_epoch(run)
        self._epoch.update()

    def log(self, run, figures: dict[str, float]) -> None:
        """Show the mean losses of an update, the speed, and the time left."""
        waiting = 100 * figures['data_seconds'] / figures['seconds']
        _show(self._epoch, [f'{figures["images_per_second"]:.0f} images/s', f'data {waiting:.0f} %'])
        self._show_left(run)
        *terms, whole = _terms(figures)
        self._losses.set_description_str(whole, refresh=False)
        _show(self._losses, terms)

    def validated(self, run, row: dict[str, Any]) -> None:
        """Move the bar of the run, and show the accuracies."""
        self._epoch.reset()
        self._note(run, row)
        self._run.update()
        self._show_left(run)

    def _note(self, run, row: dict[str, Any]) -> None:
        if row['eval_top1'] != '':
            self._top1 = [f'top-1 {side} {row[f"eval_top1_{side}"]:.2f}' for side in run.pair.sides]

    def _show_left(self, run) -> None:
        _show(self._run, [f'left {show_time(seconds_left(run))}', *self._top1])

    def end(self, run) -> None:
        """Remove them."""
        self._closing.close()

    close = end
