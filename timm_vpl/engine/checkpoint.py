"""Checkpoints in timm's format, written atomically, and read back."""
import argparse
import contextlib
import dataclasses
import logging
import math
import os
import pickle
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from timm.task import TrainingTask

from .. import __version__
from ..errors import RunError, first_line
from ..files import is_temporary, replace, replacing, temporary

_logger = logging.getLogger(__name__)

RECIPE = 'args.yaml'
EXTENSION = '.pth.tar'


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The metrics of the checkpoints in a run's folder, by file name."""
    files: dict[str, float | None] = dataclasses.field(default_factory=dict)  # metric of each checkpoint-N, best first
    bests: dict[str, tuple[float, int]] = dataclasses.field(default_factory=dict)  # metric and epoch of the others

    def add(self, epoch: int, metrics: dict[str, float], max_history: int, decreasing: bool) -> 'Ranks':
        """Return the metrics with one more epoch, ranked as in timm: of two equal ones the earlier is better.

        Epochs without a metric follow the others, the newest first.

        Args:
            epoch: The epoch.
            metrics: What the files of `bests` are chosen by, and by that of 'model_best' the numbered ones.
            max_history: Numbered ones to keep.
            decreasing: A lower metric is better, for 'model_best' and the numbered ones.
        """
        def rank(entry):
            name, metric = entry
            number = -int(name.rpartition('-')[2]) if metric is None else metric if decreasing else -metric
            return metric is None, number

        files = {**self.files, f'checkpoint-{epoch}': metrics.get('model_best')}
        bests = dict(self.bests)
        for name, value in metrics.items():
            lower = decreasing and name == 'model_best'
            if name not in bests or (value < bests[name][0] if lower else value > bests[name][0]):
                bests[name] = (value, epoch)
        return Ranks(dict(sorted(files.items(), key=rank)[:max_history]), bests)

    def state_dict(self) -> dict[str, Any]:
        """Return its entry in a checkpoint, with timm's keys."""
        bests = dict(self.bests)
        best_metric, best_epoch = bests.pop('model_best', (None, None))
        return {
            'checkpoint_files': [(name + EXTENSION, value) for name, value in self.files.items()],
            'best_metric': best_metric,
            'best_epoch': best_epoch,
            'best_branches': {name.removeprefix('best_'): best for name, best in bests.items()},
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], sides: Iterable[str]) -> 'Ranks':
        """Return that of a checkpoint, without names outside its folder, since a run deletes old files by these names.

        Raises:
            RunError: It is none.
        """
        try:
            files = {
                name.removesuffix(EXTENSION): None if value is None else float(value)
                for name, value in state.get('checkpoint_files', [])
                if re.fullmatch(r'checkpoint-\d+\.pth\.tar', name, re.ASCII)}
            bests = {f'best_{side}': state.get('best_branches', {}).get(side) for side in sides}
            if state.get('best_metric') is not None:
                bests['model_best'] = (state['best_metric'], state['best_epoch'])
            return cls(files, {name: (float(best[0]), int(best[1])) for name, best in bests.items() if best})
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as e:
            raise RunError("the 'saver' of the checkpoint is not that of a run") from e


@dataclasses.dataclass(eq=False)
class Saver:
    """Writes the checkpoints of a run into its folder.

    A checkpoint is written under another name and flushed to disk, gets all its names but `last` as hard links, and
    then the name `last`: a run that is killed before that resumes from the previous one, and repeats the epoch.

    Args:
        folder: The folder.
        task: The task to save.
        optimizer: Its optimizer.
        args: Options of the run, a plain dict.
        branches: timm's config of each branch, by side: what rebuilds it as a plain timm model.
        scaler: Gradient scaler, if there is one.
        decreasing: A lower metric is better.
        max_history: Numbered checkpoints to keep.
        milestones: Numbers of completed epochs whose checkpoints are kept for good.
        check: Raises RunError if another process owns the folder now.
    """

    folder: str
    task: TrainingTask
    optimizer: torch.optim.Optimizer
    args: dict[str, Any]
    branches: dict[str, dict]
    scaler: torch.amp.GradScaler | None = None
    decreasing: bool = False
    max_history: int = 10
    milestones: Iterable[int] = ()
    check: Callable[[], None] = lambda: None
    ranks: Ranks = dataclasses.field(default_factory=Ranks, init=False)
    failed: bool = dataclasses.field(default=False, init=False)  # the last attempt to save an epoch

    def __post_init__(self):
        self._recovered: tuple[int, int] | None = None  # (epoch, batch) of the last recovery checkpoint of this process
        recipe = Path(self.folder, RECIPE)
        self._recipe = recipe.read_bytes() if recipe.exists() else None
        last = self._path('last')
        self._temporary = temporary(last)
        found = _by_saves([last, *recovery_files(self.folder)])
        self._saves = found[-1][0] if found else 0  # of the folder, whichever checkpoint the run resumes from
        self.newest = os.path.basename(found[-1][-1]) if found else ''  # the name that was saved last
        self._recoveries = [path for *_, path in found if path != last]
        for path in filter(is_temporary, os.listdir(self.folder)):  # of an earlier attempt that was killed
            os.unlink(os.path.join(self.folder, path))

    def save(self, epoch: int, state: dict[str, Any], metrics: dict[str, float | None]) -> None:
        """Save a completed epoch; if that fails, log it and keep the older files.

        Args:
            epoch: The epoch.
            state: Further entries of the checkpoint.
            metrics: What 'model_best' and the numbered checkpoints are ranked by, and 'best_a' and 'best_b'; one that
                is not finite is none.
        """
        finite = {name: value for name, value in metrics.items() if value is not None and math.isfinite(value)}
        metric = {'metric': finite['model_best']} if 'model_best' in finite else {}
        self.failed = True
        with self._attempt():
            ranks = self.ranks.add(epoch, finite, self.max_history, self.decreasing)
            written = self._write({'epoch': epoch, 'saver': ranks.state_dict(), **state, **metric})
            for name in self._names(ranks, epoch):
                self._link(written, name)
            for name in self.ranks.files.keys() - ranks.files.keys():
                Path(self._path(name)).unlink(missing_ok=True)
            self._replace(written, 'last')
            self.ranks, self.failed = ranks, False

    def save_recovery(self, epoch: int, batch: int, state: dict[str, Any]) -> bool:
        """Save within an epoch, after `batch` of its batches; return whether that succeeded."""
        name = f'recovery-{epoch}-{max(batch - 1, 0)}'
        path = self._path(name)
        if self._recovered == (epoch, batch) and os.path.exists(path):
            return True  # nothing has changed since
        saved = False
        with self._attempt():
            # The epoch is the last one completed.
            self._replace(self._write({'epoch': epoch - 1, 'saver': self.ranks.state_dict(), **state}), name)
            self._recovered, saved = (epoch, batch), True
            self._recoveries = [*(other for other in self._recoveries if other != path), path]
            for other in self._recoveries[:-2]:
                Path(other).unlink(missing_ok=True)
        return saved

    def resume(self, state: dict[str, Any], source: str, epoch: int | None) -> None:
        """Restore the metrics of a checkpoint, and give it the names that an interruption left out.

        Args:
            state: Its entry 'saver'.
            source: Its file, in this folder.
            epoch: Its epoch, if it has one.
        """
        self.ranks = Ranks.from_state(state, self.branches)
        if epoch is not None and not os.path.basename(source).startswith('recovery-'):
            with self._attempt():
                for name in [*self._names(self.ranks, epoch), 'last']:
                    if not os.path.exists(self._path(name)):
                        self._link(source, name)
        self._forget_missing()

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, name + EXTENSION)

    def _replace(self, written: str, name: str) -> None:
        replace(written, self._path(name))
        self.newest = name + EXTENSION

    def _names(self, ranks: Ranks, epoch: int) -> list[str]:
        """Return the names that the checkpoint of an epoch has, besides `last`."""
        numbered = [name for name in ranks.files if name == f'checkpoint-{epoch}']
        bests = [name for name, (_, best) in ranks.bests.items() if best == epoch]
        return numbered + bests + [f'milestone-{epoch + 1}'] * (epoch + 1 in self.milestones)

    def _forget_missing(self):
        def there(part: dict[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in part.items() if os.path.exists(self._path(name))}

        self.ranks = Ranks(there(self.ranks.files), there(self.ranks.bests))

    @contextlib.contextmanager
    def _attempt(self) -> Iterator[None]:
        """Make the folder again if it was removed; log an error if the saving fails."""
        recipe = os.path.join(self.folder, RECIPE)
        try:
            if self._recipe is not None and not os.path.exists(recipe):
                with replacing(recipe, 'wb') as file:
                    file.write(self._recipe)
                _logger.error(
                    f'{self.folder}: was removed and made again; it will contain what is saved from now on')
                self._forget_missing()
            self.check()
            yield
        except (OSError, RuntimeError) as e:  # torch's writer turns a full disk into a RuntimeError
            with contextlib.suppress(OSError):
                os.unlink(self._temporary)
            _logger.error(f'Not saved: {self.folder}: {_cause(e)}; the run continues, older checkpoints are kept')

    def _write(self, state: dict[str, Any]) -> str:
        """Write a checkpoint to a temporary file and return its path."""
        self._saves += 1
        state = {
            'arch': '+'.join(config['architecture'] for config in self.branches.values()),
            'args': self.args,
            'branches': self.branches,
            'version': 2,
            'timm_vpl_version': __version__,
            'optimizer': self.optimizer.state_dict(),
            **self.task.get_checkpoint_state(),
            **self.task.get_checkpoint_state(ema=True),
            **({} if self.scaler is None else {'amp_scaler': self.scaler.state_dict()}),
            'saves': self._saves,
            'time': time.time(),
            **state,
        }
        with open(self._temporary, 'wb') as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        return self._temporary

    def _link(self, source: str, name: str) -> None:
        """Give a file another name, replacing that file: a hard link where the file system supports them."""
        other = temporary(self._path(name))
        try:
            try:
                os.link(source, other)
            except (OSError, NotImplementedError):
                shutil.copy2(source, other)
                with open(other, 'rb') as file:
                    os.fsync(file.fileno())
            replace(other, self._path(name))
        finally:
            Path(other).unlink(missing_ok=True)


def _cause(error: BaseException) -> str:
    """Return why a file could not be written, where torch's writer hides it behind its own error."""
    while error.__context__ is not None and not isinstance(error, OSError):
        error = error.__context__
    return error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)


def recovery_files(folder: str) -> list[str]:
    """Return the recovery checkpoints of a folder."""
    return sorted(
        str(path) for path in Path(folder).glob('recovery-*')
        if re.fullmatch(r'recovery-[0-9]+-[0-9]+\.pth\.tar', path.name))  # a user's copies have other names


def _by_saves(paths: list[str], log: Callable[[str], None] = _logger.debug) -> list[tuple[int, float, str]]:
    """Return (saves of its folder, time, path) of checkpoints, sorted; log which can't be read and why."""
    found = []
    for path in filter(os.path.exists, paths):
        try:
            checkpoint = read_checkpoint(path, mmap=True)
            place = (checkpoint.get('saves', 0), checkpoint.get('time', os.path.getmtime(path)))
            if not all(isinstance(value, (int, float)) for value in place):
                raise RunError(f"{path}: not a training checkpoint, its 'saves' or 'time' is not a number")
            found.append((*place, path))
        except RunError as e:
            log(f'Skipped: {e}')
    return sorted(found)


def newest_checkpoint(folder: str) -> str | None:
    """Return the checkpoint of a run's folder that was written last, of those that can be read; None without any.

    The number of saves decides, which only grows; a clock may be wrong.

    Raises:
        RunError: There are checkpoints, but none can be read, now or after a moment.
    """
    found = _by_saves([os.path.join(folder, 'last.pth.tar'), *recovery_files(folder)], _logger.warning)
    found = found or _by_saves(sorted(map(str, Path(folder).glob('checkpoint-*.pth.tar'))), _logger.warning)
    if found:
        _, saved, newest = found[-1]
        newer = [os.path.basename(path) for _, clock, path in found if clock > saved]
        if newer:
            _logger.warning(f'Skipped: {", ".join(newer)}: newer by the clock, but saved before {newest}')
        return newest
    left = [path.name for path in sorted(Path(folder).glob('*.pth.tar'))]
    if left:
        raise RunError(f'--resume auto: none of the checkpoints in {folder} can be read ({", ".join(left[:4])}); '
                       f'move them away for a fresh start')
    return None


def read_checkpoint(path: str, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint on the CPU, tensors and plain types only (and timm's argparse.Namespace).

    Args:
        path: File of torch.save, or of safetensors.
        mmap: Leave tensors on disk until they are used.

    Raises:
        RunError: The file can't be read, or contains other types.
    """
    try:
        if str(path).endswith('.safetensors'):
            checkpoint = safetensors.torch.load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):
                checkpoint = torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as e:
        found = re.search(r'GLOBAL (\S+)', str(e))
        raise RunError(f'{path}: refused, it is not a checkpoint of tensors and plain types'
                       f'{f" ({found[1]})" if found else ""}') from e
    except Exception as e:  # torch's reader fails in many ways on other kinds of files
        size = os.path.getsize(path) if os.path.exists(path) else 0
        raise RunError(f'{path} ({size} bytes): truncated, or not a checkpoint ({first_line(e, 80)})') from e
    if not isinstance(checkpoint, dict) or not _is_state(checkpoint.get('state_dict')):
        raise RunError(f"{path}: not a training checkpoint, it has no 'state_dict' of weights")
    if not _is_state(checkpoint.get('state_dict_ema', {})):
        raise RunError(f"{path}: not a training checkpoint, its 'state_dict_ema' contains no weights")
    return checkpoint


def _is_state(value) -> bool:
    return isinstance(value, dict) and all(
        isinstance(key, str) and isinstance(tensor, torch.Tensor) for key, tensor in value.items())
