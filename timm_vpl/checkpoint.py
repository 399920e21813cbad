"""Checkpoints: timm's saver, made safe against interruption, with each branch's own best epoch; reading them back."""
import argparse
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from timm.utils import CheckpointSaver

from . import __version__
from .errors import RunError, first_line


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
        self._metrics = {}
        self._in_epoch = False

    def save(self, epoch: int, metric=None, branch_metrics=None, metrics=None):
        """Save an epoch and its `metrics`, ranked by `metric`; link each branch's best by `branch_metrics`.

        Returns:
            Tuple of (best_metric, best_epoch), both None until a ranked checkpoint has been saved.
        """
        self._metrics = metrics or {}
        improved = []
        for side, value in (branch_metrics or {}).items():
            if self.best_branches[side][0] is None or value > self.best_branches[side][0]:
                self.best_branches[side] = (value, epoch)
                improved.append(side)
        best = self.save_checkpoint(epoch, metric)
        for side in improved:
            self._duplicate(self._path('last'), self._path(f'best_{side}'))
        return best

    def save_recovery(self, epoch: int, batch_idx: int = 0) -> None:
        """Save within an epoch; a run that resumes from there repeats the epoch, with these weights."""
        self._in_epoch = True
        try:
            super().save_recovery(epoch, batch_idx)
        finally:
            self._in_epoch = False

    def _path(self, name):
        return os.path.join(self.checkpoint_dir, name + self.extension)

    def _save(self, save_path, epoch, metric=None):
        state = {
            'epoch': epoch - self._in_epoch,  # the last one completed
            'arch': '+'.join(config['architecture'] for config in self.branches.values()),
            'args': self.options,
            'branches': self.branches,
            'metrics': {} if self._in_epoch else self._metrics,
            'optimizer': self.optimizer.state_dict(),
            'version': 2,
            'timm_vpl_version': __version__,
            **self.task.get_checkpoint_state(unwrap_fn=self.unwrap_fn),
            **self.task.get_checkpoint_state(ema=True, unwrap_fn=self.unwrap_fn),
            'saver': self.state_dict(epoch, metric),
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
        os.replace(src, dst)

    def _duplicate(self, src, dst):
        temporary = f'{dst}.tmp'
        Path(temporary).unlink(missing_ok=True)
        try:
            os.link(src, temporary)
        except (OSError, NotImplementedError):
            shutil.copy2(src, temporary)
        os.replace(temporary, dst)

    def state_dict(self, epoch=None, metric=None):
        """Return timm's bookkeeping and the branches' best epochs."""
        return {**super().state_dict(epoch, metric), 'best_branches': self.best_branches}

    def load_state_dict(self, state_dict):
        """Restore the bookkeeping, and a link that an interruption prevented."""
        super().load_state_dict(state_dict)
        for side, best in state_dict.get('best_branches', {}).items():
            self.best_branches[side] = tuple(best)
            if best[1] is not None and best[1] == state_dict['pending'][0] and os.path.exists(self._path('last')):
                self._duplicate(self._path('last'), self._path(f'best_{side}'))


def read_checkpoint(path: str, bare: bool = False) -> dict[str, Any]:
    """Read a checkpoint on the CPU, tensors and plain types only (and timm's argparse.Namespace).

    Args:
        path: File of torch.save, or of safetensors.
        bare: Take a file of nothing but weights too, as timm's avg_checkpoints.py and clean_checkpoint.py write it.

    Raises:
        RunError: The file can't be read, or would need other classes.
    """
    try:
        if str(path).endswith('.safetensors'):
            checkpoint = safetensors.torch.load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):
                checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as e:
        found = re.search(r'GLOBAL (\S+)', str(e))
        raise RunError(f'{path}: refused, it is not a checkpoint of tensors and plain types '
                       f'({found[1] if found else first_line(e, 80)})') from e
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
