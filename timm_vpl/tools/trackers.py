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

    The step is the number of optimizer updates. A tracker that fails is left alone from then on, with a warning.
    """

    def start(self, run) -> None:
        """Begin, or go on where the run goes on."""
        self._failed = False
        self._try(self._open, run)

    def log(self, run, figures: dict[str, float]) -> None:
        """Send the figures of an update."""
        self._try(self._send, {f'train/{name}': value for name, value in figures.items()}, run.num_updates)

    def validated(self, run, row: dict[str, Any]) -> None:
        """Send the row of an epoch."""
        numbers = {f'epoch/{name}': value for name, value in row.items() if value != ''}
        self._try(self._send, numbers, run.num_updates)

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

    def _send(self, numbers: dict[str, float], step: int) -> None:
        raise NotImplementedError

    def _finish(self) -> None:
        raise NotImplementedError


class TensorBoard(Tracker):
    """Writes event files to the folder `tensorboard` of the run."""

    def _open(self, run) -> None:
        """Go on after the last update: what was written beyond it is hidden."""
        from torch.utils.tensorboard import SummaryWriter
        self._writer = SummaryWriter(os.path.join(run.output_dir, 'tensorboard'), purge_step=run.num_updates + 1)

    def _send(self, numbers: dict[str, float], step: int) -> None:
        """Write the numbers."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def _finish(self) -> None:
        """Write what is left."""
        self._writer.close()


class Wandb(Tracker):
    """Sends to Weights & Biases; WANDB_MODE=offline keeps all in the folder of the run."""

    def _open(self, run) -> None:
        """Begin a run there, or go on with that of the folder."""
        import wandb
        options, asked = run.options, run.options.run
        file = Path(run.output_dir, 'wandb_id')
        known = file.read_text() if file.exists() else None
        self._run = wandb.init(
            project=asked.wandb_project, name=os.path.basename(run.output_dir), config=recipe_values(options),
            tags=list(asked.wandb_tags), dir=run.output_dir, id=asked.wandb_resume_id or known,
            resume='must' if asked.wandb_resume_id else 'allow')
        file.write_text(self._run.id)

    def _send(self, numbers: dict[str, float], step: int) -> None:
        """Send the numbers; those of a step that it has already are left out there."""
        self._run.log(numbers, step=step)

    def _finish(self) -> None:
        """Send what is left."""
        self._run.finish()


# By the option that asks for it: what observes, and the package that it needs.
TRACKERS = {'log_tensorboard': (TensorBoard, 'tensorboard'), 'log_wandb': (Wandb, 'wandb')}


class CurvesObserver:
    """Draws curves.png in the folder of a run: after each validation, and when it ends."""

    def start(self, run) -> None:
        """Say where there will be none."""
        if not can_plot():
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
    return [
        Bars() if bars else Lines(), *[ExportObserver()] * run.export, *[CurvesObserver()] * run.curves, *trackers]
