"""Observers of a run: where its figures go besides its folder."""
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import UsageError, first_line
from ..options.parser import flag_of
from ..options.train import Options, recipe_values
from .export import ExportObserver
from .plots import CURVES, INSTALL, can_plot, draw_run
from .progress import Bars, Lines

_logger = logging.getLogger('train')


class Tracker:
    """Sends figures to a tracker: of logged updates as `train/NAME`, of epochs as `epoch/NAME`.

    Both over the number of optimizer updates. A resumed run sends all its epochs again, since it may have been killed
    after it saved an epoch and before it sent it. A tracker that fails gets nothing more, after a warning.

    Args:
        name: Its name.
        open: Starts or resumes for a run; returns functions that send figures of a kind at an update, and that close.
    """

    def __init__(self, name: str, open: Callable[[Any], tuple[Callable, Callable]]):
        self._name, self._open = name, open

    def start(self, run) -> None:
        """Start, or resume with a resumed run."""
        with self._unless_it_fails():
            self._send, self._finish = self._open(run)
        for row in run.rows:
            self.validated(run, row)

    def log(self, run, figures: dict[str, float]) -> None:
        """Send the figures of an update."""
        with self._unless_it_fails():
            self._send('train', figures, run.num_updates)

    def validated(self, run, row: dict[str, Any]) -> None:
        """Send the row of an epoch."""
        numbers = {name: value for name, value in row.items() if value != ''}
        with self._unless_it_fails():
            self._send('epoch', numbers, (row['epoch'] + 1) * run.updates_per_epoch)

    def close(self, run) -> None:
        """End it."""
        with self._unless_it_fails():
            self._finish()

    @contextlib.contextmanager
    def _unless_it_fails(self) -> Iterator[None]:
        try:
            yield
        except Exception as e:
            self._send = self._finish = lambda *args: None
            _logger.warning(f'{self._name}: {first_line(e, 200)}; the run continues without it')


def open_tensorboard(run) -> tuple[Callable, Callable]:
    """Write event files to the folders `tensorboard/train` and `tensorboard/epoch` of the run.

    Two folders, since a reader hides earlier entries by their step alone. The last update of an epoch, which a resumed
    run may keep, has the step of the epoch, which it may have to repeat. Repeated updates and all epochs, which are
    sent again, hide their earlier entries.
    """
    from torch.utils.tensorboard import SummaryWriter
    closing = contextlib.ExitStack()
    writers = {
        kind: closing.enter_context(SummaryWriter(os.path.join(run.output_dir, 'tensorboard', kind), purge_step=step))
        for kind, step in (('train', run.num_updates + 1), ('epoch', 0))}

    def send(kind: str, numbers: dict[str, float], updates: int) -> None:
        for name, value in numbers.items():
            writers[kind].add_scalar(f'{kind}/{name}', value, updates)
        writers[kind].flush()  # before a later checkpoint

    return send, closing.close


def open_wandb(run) -> tuple[Callable, Callable]:
    """Send to a run of Weights & Biases, that of the folder if any; WANDB_MODE=offline keeps all data there."""
    os.environ.setdefault('WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL', '1')  # seconds that a kill may cost; else 15
    import wandb
    asked, file = run.options.run, Path(run.output_dir, 'wandb_id')
    known = file.read_text() if file.exists() else None
    there = wandb.init(
        project=asked.wandb_project, name=os.path.basename(run.output_dir), config=recipe_values(run.options),
        tags=list(asked.wandb_tags), dir=run.output_dir, id=asked.wandb_resume_id or known,
        resume='must' if asked.wandb_resume_id else 'allow')
    file.write_text(there.id)
    there.define_metric('*', step_metric='update')

    def send(kind: str, numbers: dict[str, float], updates: int) -> None:
        step = 2 * updates - (kind == 'train')  # its own steps distinguish an update from its epoch
        if step >= there.step:  # else it has them already
            named = {f'{kind}/{name}': value for name, value in numbers.items()}
            there.log({**named, 'update': updates}, step=step, commit=True)

    return send, there.finish


# By its option: its name, how it starts, and the package that it needs.
TRACKERS = {
    'log_tensorboard': ('TensorBoard', open_tensorboard, 'tensorboard'), 'log_wandb': ('W&B', open_wandb, 'wandb')}


class CurvesObserver:
    """Draws curves.png in the folder of a run: after each validation, and when it ends."""

    def start(self, run) -> None:
        """Import matplotlib, which takes longer than drawing, or log that there will be no curves."""
        try:
            import matplotlib.figure  # noqa: F401
        except Exception:  # also of an incomplete installation
            _logger.info(f'No {CURVES}: it needs matplotlib ({INSTALL})')

    def validated(self, run, row: dict[str, Any]) -> None:
        """Draw all epochs so far, if this one was validated."""
        if row['eval_top1'] != '':
            self.end(run)

    def end(self, run) -> None:
        """Draw all epochs; warn if that fails."""
        try:
            if can_plot() and run.rows:
                draw_run(run.output_dir, run.rows, run.options.flat())
        except Exception as e:  # a missing picture must not end a run
            _logger.warning(f'{CURVES}: cannot be drawn ({first_line(e)})')


def observers_of(options: Options) -> list[Any]:
    """Return the observers that the options ask for; on a terminal bars show the progress of the run.

    Raises:
        UsageError: A tracker's package is missing.
    """
    run = options.run
    trackers = []
    for flag, (name, open, package) in TRACKERS.items():
        if getattr(run, flag):
            spec = find_spec(package)
            if spec is None or spec.loader is None:  # without a loader it is just a folder of that name
                raise UsageError(f'{flag_of(flag)}: needs the package {package} (pip install {package})')
            trackers.append(Tracker(name, open))
    bars = sys.stderr.isatty() and not (run.quiet or run.no_progress)
    return [  # last, so that bars are below the others' lines at the start
        *[ExportObserver()] * run.export, *[CurvesObserver()] * run.curves, *trackers, Bars() if bars else Lines()]
