"""Observers of a run: what else hears of it beside its folder."""
import logging
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import UsageError, first_line
from ..options.train import Options, recipe_values
from .export import ExportObserver
from .plots import CURVES, INSTALL, can_plot, draw_run
from .progress import Bars, Lines

_logger = logging.getLogger('train')


class Tracker:
    """Sends figures to a tracker: of updates that are looked at as `train/NAME`, of epochs as `epoch/NAME`.

    Both over the number of optimizer updates. A run that goes on tells all its epochs again: one may have been killed
    after it had saved an epoch and before it could tell. A tracker that fails is left alone, with a warning.
    """

    def start(self, run) -> None:
        """Begin, or go on where the run goes on."""
        self._failed = False
        self._try(self._open, run)
        for row in run.rows:
            self.validated(run, row)

    def log(self, run, figures: dict[str, float]) -> None:
        """Send the figures of an update."""
        self._try(self._send, 'train', figures, run.num_updates)

    def validated(self, run, row: dict[str, Any]) -> None:
        """Send the row of an epoch."""
        numbers = {name: value for name, value in row.items() if value != ''}
        self._try(self._send, 'epoch', numbers, (row['epoch'] + 1) * run.updates_per_epoch)

    def close(self, run) -> None:
        """End it."""
        self._try(self._finish)

    def _try(self, act, *args) -> None:
        if self._failed:
            return
        try:
            act(*args)
        except Exception as e:
            self._failed = True
            _logger.warning(f'{type(self).__name__}: {first_line(e, 200)}; the run goes on without it')

    def _open(self, run) -> None:
        raise NotImplementedError

    def _send(self, kind: str, numbers: dict[str, float], updates: int) -> None:
        raise NotImplementedError

    def _finish(self) -> None:
        raise NotImplementedError


class TensorBoard(Tracker):
    """Writes event files to the folders `tensorboard/train` and `tensorboard/epoch` of the run.

    Two folders, since a reader hides what was written before by its step alone, and the last update of an epoch, which
    a run that goes on may keep, has the step of the epoch, which it may have to do again.
    """

    def _open(self, run) -> None:
        """Hide the updates that are done again, and all epochs, which are told again."""
        from torch.utils.tensorboard import SummaryWriter
        self._writers = {
            kind: SummaryWriter(os.path.join(run.output_dir, 'tensorboard', kind), purge_step=step)
            for kind, step in (('train', run.num_updates + 1), ('epoch', 0))}

    def _send(self, kind: str, numbers: dict[str, float], updates: int) -> None:
        """Write the numbers, before a checkpoint is written that comes after them."""
        for name, value in numbers.items():
            self._writers[kind].add_scalar(f'{kind}/{name}', value, updates)
        self._writers[kind].flush()

    def _finish(self) -> None:
        """Write what is left."""
        for writer in self._writers.values():
            writer.close()


class Wandb(Tracker):
    """Sends to Weights & Biases; WANDB_MODE=offline keeps all in the folder of the run."""

    def _open(self, run) -> None:
        """Begin a run there, or go on with that of the folder."""
        os.environ.setdefault('WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL', '1')  # seconds that a kill may cost; else 15
        import wandb
        options, asked = run.options, run.options.run
        file = Path(run.output_dir, 'wandb_id')
        known = file.read_text() if file.exists() else None
        self._run = wandb.init(
            project=asked.wandb_project, name=os.path.basename(run.output_dir), config=recipe_values(options),
            tags=list(asked.wandb_tags), dir=run.output_dir, id=asked.wandb_resume_id or known,
            resume='must' if asked.wandb_resume_id else 'allow')
        file.write_text(self._run.id)
        self._run.define_metric('*', step_metric='update')

    def _send(self, kind: str, numbers: dict[str, float], updates: int) -> None:
        """Send the numbers, but for those that it has already; its own steps tell updates and epochs apart."""
        step = 2 * updates - (kind == 'train')
        if step >= self._run.step:
            named = {f'{kind}/{name}': value for name, value in numbers.items()}
            self._run.log({**named, 'update': updates}, step=step, commit=True)

    def _finish(self) -> None:
        """Send what is left."""
        self._run.finish()


# By the option that asks for it: what observes, and the package that it needs.
TRACKERS = {'log_tensorboard': (TensorBoard, 'tensorboard'), 'log_wandb': (Wandb, 'wandb')}


class CurvesObserver:
    """Draws curves.png in the folder of a run: after each validation, and when it ends."""

    def start(self, run) -> None:
        """Import what draws, which takes longer than a picture, or say that there will be none."""
        try:
            import matplotlib.figure  # noqa: F401
        except Exception:  # also of one that is installed by half
            _logger.info(f'No {CURVES}: it needs matplotlib ({INSTALL})')

    def validated(self, run, row: dict[str, Any]) -> None:
        """Draw all epochs so far, if this one was validated."""
        if row['eval_top1'] != '':
            self.end(run)

    def end(self, run) -> None:
        """Draw all epochs; where that fails, say so."""
        try:
            if can_plot() and run.rows:
                draw_run(run.output_dir, run.rows, run.options.flat())
        except Exception as e:  # a picture is no reason to end a run, whatever failed
            _logger.warning(f'{CURVES}: can not be drawn ({first_line(e)})')


def observers_of(options: Options) -> list[Any]:
    """Return the observers that the options ask for; on a terminal bars show how far the run is.

    Raises:
        UsageError: A tracker's package is not there.
    """
    run = options.run
    trackers = []
    for name, (tracker, package) in TRACKERS.items():
        if getattr(run, name):
            spec = find_spec(package)
            if spec is None or spec.loader is None:  # without a loader it is a mere folder of that name
                raise UsageError(f"--{name.replace('_', '-')}: needs the package {package} (pip install {package})")
            trackers.append(tracker())
    bars = sys.stderr.isatty() and not (run.quiet or run.no_progress)
    return [  # bars below what the others say when they start
        *[ExportObserver()] * run.export, *[CurvesObserver()] * run.curves, *trackers, Bars() if bars else Lines()]
