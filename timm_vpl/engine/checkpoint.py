"""Checkpoints: timm's saver, made safe against interruption, with each branch's own best epoch; reading them back."""
import argparse
import contextlib
import logging
import math
import os
import pickle
import re
import shutil
import time
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from timm.utils import CheckpointSaver

from .. import __version__
from ..errors import RunError, first_line
from ..files import replace, replacing

_logger = logging.getLogger(__name__)

RECIPE = 'args.yaml'


class PairCheckpointSaver(CheckpointSaver):
    """timm's CheckpointSaver for a PairTask.

    Every file is written under another name, flushed to disk and renamed, so that an interruption leaves the previous
    one. `best_a` and `best_b` hold each branch's own best epoch, as hard links where the file system has them.

    Args:
        task: The task to save.
        optimizer: Its optimizer.
        args: Options of the run, a plain dict.
        branches: timm's config of each branch, by side: what rebuilds it as a plain timm model.
        **kwargs: timm's further arguments.
    """

    def __init__(self, task, optimizer, args: dict[str, Any], branches: dict[str, dict], **kwargs):
        super().__init__(task.get_trainable_module(), optimizer, task=task, **kwargs)
        self.options = args
        self.branches = branches
        self.best_branches = {side: (None, None) for side in branches}  # (metric, epoch)
        self.failed = False  # the last attempt to save an epoch
        self._state: dict[str, Any] = {}
        self._pending: dict[str, Any] = {}
        self._written = False  # `last` is there already, only its place among the others is open
        recipe = Path(self.checkpoint_dir, RECIPE)
        self._recipe = recipe.read_bytes() if recipe.exists() else None
        self._recovered = None  # (epoch, batch) of the last recovery checkpoint of this process
        found, _ = _by_saves([self._path('last'), *recovery_files(self.recovery_dir)])
        self._saves = found[-1][0] if found else 0  # of the folder, whatever checkpoint the run goes on from
        for path in Path(self.checkpoint_dir).glob('*tmp*'):  # of an earlier attempt that was killed
            if re.fullmatch(r'(recovery_)?tmp\.pth\.tar|.*\.pth\.tar\.tmp|.*\.\d+\.tmp', path.name):
                path.unlink()

    def save(
            self,
            epoch: int,
            state: dict[str, Any],
            metric: float | None = None,
            branch_metrics: dict[str, float] | None = None,
            milestone: bool = False,
    ) -> None:
        """Save a completed epoch; where that fails, say so and keep the older files.

        Args:
            epoch: The epoch.
            state: Further entries of the checkpoint.
            metric: What the checkpoint is ranked by; one that is not finite is none.
            branch_metrics: What each branch's best epoch is chosen by, likewise.
            milestone: Keep it for good, as `milestone-N`, N the completed epochs.
        """
        self._state = {'epoch': epoch, **state}
        if metric is not None and not math.isfinite(metric):
            metric = None
        branch_metrics = {side: value for side, value in (branch_metrics or {}).items() if math.isfinite(value)}
        self._pending = {'branch_metrics': branch_metrics, 'milestone': milestone}
        self.failed = not self._attempt(self._finish, epoch, metric)

    def save_recovery(self, epoch: int, batch: int, state: dict[str, Any]) -> bool:
        """Save within an epoch, after `batch` of its batches; return whether that went well."""
        if self._recovered == (epoch, batch) and os.path.exists(self.curr_recovery_file):
            return True  # nothing has changed since
        index = max(batch - 1, 0)
        name = f'{self.recovery_prefix}-{epoch}-{index}{self.extension}'
        # A file of this name is written over; timm would then delete it as its own predecessor.
        before = [path for path in (self.prev_recovery_file, self.curr_recovery_file) if os.path.basename(path) != name]
        self.prev_recovery_file, self.curr_recovery_file = ['', *before][-2:]
        self._state = {'epoch': epoch - 1, **state}  # the last one completed
        self._pending = {}
        saved = self._attempt(super().save_recovery, epoch, index)
        if saved:
            self._recovered = (epoch, batch)
        return saved

    def _attempt(self, save, *args) -> bool:
        try:
            self._make_again()
            save(*args)
            return True
        except (OSError, RuntimeError) as e:  # torch's writer turns a full disk into a RuntimeError
            for name in ('tmp', 'recovery_tmp'):
                with contextlib.suppress(OSError):
                    os.unlink(self._path(name))
            _logger.error(f'Not saved: {self.checkpoint_dir}: {_cause(e)}; the run goes on, older checkpoints are kept')
            return False

    def _make_again(self):
        """Make the folder again if it was removed, and forget what is not in it any more."""
        folder, recipe = self.checkpoint_dir, os.path.join(self.checkpoint_dir, RECIPE)
        if os.path.isdir(folder) and (self._recipe is None or os.path.exists(recipe)):
            return
        os.makedirs(folder, exist_ok=True)
        if self._recipe is not None:
            with replacing(recipe, 'wb') as file:
                file.write(self._recipe)
        _logger.error(f'{folder}: was removed, made again; it will hold what is saved from now on')
        self.checkpoint_files = [entry for entry in self.checkpoint_files if os.path.exists(entry[0])]
        if not os.path.exists(self._path('model_best')):
            self.best_metric = self.best_epoch = None
        for side in self.branches:
            if not os.path.exists(self._path(f'best_{side}')):
                self.best_branches[side] = (None, None)

    def _finish(self, epoch, metric):
        """Save, rank and link, each step in a way that can be repeated."""
        self.save_checkpoint(epoch, metric)
        for side, value in self._pending.get('branch_metrics', {}).items():
            if self.best_branches[side][0] is None or value > self.best_branches[side][0]:
                self.best_branches[side] = (value, epoch)
                self._duplicate(self._path('last'), self._path(f'best_{side}'))
        if self._pending.get('milestone'):
            self.save_milestone(epoch + 1)

    def _path(self, name):
        return os.path.join(self.checkpoint_dir, name + self.extension)

    def _save(self, save_path, epoch, metric=None):
        if self._written:
            return
        self._saves += 1
        state = {
            'arch': '+'.join(config['architecture'] for config in self.branches.values()),
            'args': self.options,
            'branches': self.branches,
            'optimizer': self.optimizer.state_dict(),
            'version': 2,
            'timm_vpl_version': __version__,
            **self.task.get_checkpoint_state(unwrap_fn=self.unwrap_fn),
            **self.task.get_checkpoint_state(ema=True, unwrap_fn=self.unwrap_fn),
            'saver': {**self.state_dict(epoch, metric), **self._pending},
            'saves': self._saves,
            'time': time.time(),
            **self._state,
        }
        if self.amp_scaler is not None:
            state['amp_scaler'] = self.amp_scaler.state_dict()
        if metric is not None:
            state['metric'] = metric
        with open(save_path, 'wb') as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())

    def _replace(self, src, dst):
        if not self._written:
            replace(src, dst)

    def _duplicate(self, src, dst):
        if os.path.exists(dst) and os.path.samefile(src, dst):
            return  # a rename of one name of a file to another would leave both
        temporary = f'{dst}.tmp'
        Path(temporary).unlink(missing_ok=True)
        try:
            try:
                os.link(src, temporary)
            except (OSError, NotImplementedError):
                shutil.copy2(src, temporary)
                with open(temporary, 'rb') as file:
                    os.fsync(file.fileno())
            replace(temporary, dst)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temporary)

    def state_dict(self, epoch=None, metric=None):
        """Return timm's bookkeeping and the branches' best epochs."""
        return {**super().state_dict(epoch, metric), 'best_branches': dict(self.best_branches)}

    def load_state_dict(self, state_dict, source: str | None = None):
        """Restore the bookkeeping, and do what an interruption kept from being done after the file was written.

        Args:
            state_dict: The entry 'saver' of a checkpoint of this folder.
            source: The checkpoint's file.
        """
        if not state_dict:
            return
        state_dict = _own(state_dict, self.branches)
        last, completed = self._path('last'), 'branch_metrics' in state_dict
        is_last = completed and source is not None and os.path.exists(last) and os.path.samefile(source, last)
        # timm counts the checkpoint itself in if its link is there; the latest one's may be missing.
        super().load_state_dict(state_dict if completed and not is_last else {**state_dict, 'pending': (None, None)})
        self.best_branches.update({side: tuple(best) for side, best in state_dict.get('best_branches', {}).items()})
        recoveries = [path for *_, path in _by_saves(recovery_files(self.recovery_dir))[0]]
        for path in recoveries[:-2]:
            Path(path).unlink(missing_ok=True)
        self.prev_recovery_file, self.curr_recovery_file = ['', '', *recoveries][-2:]
        if is_last:
            self._pending = {name: state_dict[name] for name in ('branch_metrics', 'milestone')}
            self._written = True
            self._attempt(self._finish, *state_dict['pending'])
            self._written = False
        elif completed:
            for side, value in state_dict['branch_metrics'].items():
                if self.best_branches[side][0] is None or value > self.best_branches[side][0]:
                    self.best_branches[side] = (value, state_dict['pending'][0])


def _own(state_dict: dict[str, Any], sides) -> dict[str, Any]:
    """Return a saver's bookkeeping without names that lead out of its folder: what it names, it replaces and deletes.

    Raises:
        RunError: It is none.
    """
    try:
        own = {**state_dict, 'checkpoint_files': [
            (name, metric) for name, metric in state_dict.get('checkpoint_files', [])
            if re.fullmatch(r'checkpoint-\d+\.pth\.tar', name, re.ASCII)]}
        for key in ('best_branches', 'branch_metrics'):
            if key in own:
                own[key] = {side: value for side, value in own[key].items() if side in sides}
        epoch = own.get('pending', (None, None))[0]
        if epoch is not None and not isinstance(epoch, int):
            raise TypeError
    except (AttributeError, IndexError, TypeError, ValueError) as e:
        raise RunError("the 'saver' of the checkpoint is not that of a run") from e
    return own


def _cause(error: BaseException) -> str:
    """Return why a file could not be written, where torch's writer hides it behind an error of its own."""
    while error.__context__ is not None and not isinstance(error, OSError):
        error = error.__context__
    return error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)


def recovery_files(folder: str) -> list[str]:
    """Return the recovery checkpoints of a folder in the order of their places in the run."""
    found = []
    for path in Path(folder).glob('recovery-*.pth.tar'):
        place = re.fullmatch(r'recovery-(\d+)-(\d+)\.pth\.tar', path.name)
        if place:
            found.append((int(place[1]), int(place[2]), str(path)))
    return [path for *_, path in sorted(found)]


def _by_saves(paths: list[str]) -> tuple[list[tuple[int, float, str]], list[RunError]]:
    """Return (saves of its folder, time, path) of checkpoints that can be read, in this order; why others can't."""
    found, errors = [], []
    for path in filter(os.path.exists, paths):
        try:
            checkpoint = read_checkpoint(path, mmap=True)
            place = (checkpoint.get('saves', 0), checkpoint.get('time', os.path.getmtime(path)))
            if not all(isinstance(value, (int, float)) for value in place):
                raise RunError(f"{path}: not a training checkpoint, its 'saves' or 'time' is no number")
            found.append((*place, path))
        except RunError as e:
            errors.append(e)
    return sorted(found), errors


def newest_checkpoint(folder: str) -> str | None:
    """Return the checkpoint of a run's folder that was written last, of those that can be read; None without any.

    The number of saves tells, which only grows; a clock may have run behind.

    Raises:
        RunError: There are checkpoints, and none can be read: not now, or not any more.
    """
    older = sorted(map(str, Path(folder).glob('checkpoint-*.pth.tar')))
    for paths in ([os.path.join(folder, 'last.pth.tar'), *recovery_files(folder)], older):
        found, errors = _by_saves(paths)
        for error in errors:
            _logger.warning(f'Passed over: {error}')
        if found:
            _, saved, newest = found[-1]
            newer = [os.path.basename(path) for _, clock, path in found if clock > saved]
            if newer:
                _logger.warning(f'Passed over: {", ".join(newer)}: newer by the clock, but saved before {newest}')
            return newest
    left = [path.name for path in sorted(Path(folder).glob('*.pth.tar')) if 'tmp' not in path.name]
    if left:
        raise RunError(f'--resume auto: of the checkpoints in {folder} none can be read ({", ".join(left[:4])}); '
                       f'for a fresh start move them away')
    return None


def read_checkpoint(path: str, bare: bool = False, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint on the CPU, tensors and plain types only (and timm's argparse.Namespace).

    Args:
        path: File of torch.save, or of safetensors.
        bare: Take a file of nothing but weights too, as timm's avg_checkpoints.py and clean_checkpoint.py write it.
        mmap: Leave tensors on disk until they are used.

    Raises:
        RunError: The file can't be read, or would need other classes.
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
    except Exception as e:  # torch's reader of a file that is something else fails in many ways
        size = os.path.getsize(path) if os.path.exists(path) else 0
        raise RunError(f'{path} ({size} bytes): truncated, or not a checkpoint ({first_line(e, 80)})') from e
    if bare and _is_state(checkpoint):
        return {'state_dict': checkpoint}
    if not isinstance(checkpoint, dict) or not _is_state(checkpoint.get('state_dict')):
        raise RunError(f"{path}: not a training checkpoint, it has no 'state_dict' of weights")
    if not _is_state(checkpoint.get('state_dict_ema', {})):
        raise RunError(f"{path}: not a training checkpoint, its 'state_dict_ema' holds no weights")
    return checkpoint


def _is_state(value) -> bool:
    return isinstance(value, dict) and all(
        isinstance(key, str) and isinstance(tensor, torch.Tensor) for key, tensor in value.items())


def checkpoint_bytes(task, optimizer) -> int:
    """Estimate the size of a checkpoint: weights, EMA and the optimizer's two moments."""
    weights = [
        *task.get_checkpoint_state()['state_dict'].values(),
        *task.get_checkpoint_state(ema=True).get('state_dict_ema', {}).values(),
    ]
    trained = [parameter for group in optimizer.param_groups for parameter in group['params']]
    return sum(tensor.nbytes for tensor in weights) + 2 * sum(parameter.nbytes for parameter in trained)
