"""Trained models, each a plain timm model, from where they are: a run, a checkpoint, an export, the Hub, timm."""
import json
import logging
import math
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch.nn as nn
from timm.data import resolve_model_data_config
from timm.models import clean_state_dict, create_model
from timm.models._hub import save_config_for_hf

from ..core.names import SIDES
from ..errors import RunError, UsageError, first_line
from ..options.options import INTERPOLATIONS
from .checkpoint import read_checkpoint

_logger = logging.getLogger(__name__)


class TrainedModel(NamedTuple):
    """A trained model by itself, in evaluation mode on the CPU, and what its images are prepared by."""
    model: nn.Module
    source: str  # file, folder or name that it was read from
    architecture: str
    data_config: dict[str, Any]  # input_size, mean, std, interpolation, crop_pct, crop_mode
    class_names: list[str] | None = None
    side: str | None = None  # of the pair that it was a branch of
    ema: bool | None = None  # whether these are averaged weights
    checkpoint: dict[str, Any] = {}  # what else the checkpoint says: epoch, args, metrics, architectures by side

    @property
    def label(self) -> str:
        """Return a short name: the architecture, and of a branch the side and the kind of its weights."""
        if self.side is None:
            return self.architecture
        return f'{self.architecture} ({self.side}{"" if self.ema is None else ", EMA" if self.ema else ", raw"})'


# What timm's configuration says of the weights that it would have downloaded, not of ours.
_PROVENANCE = (
    'tag', 'license', 'description', 'origin_url', 'paper_name', 'paper_ids', 'notes', 'label_names',
    'label_descriptions')


def branch_config(model: nn.Module, data_config: dict[str, Any], class_names: list[str] | None) -> dict[str, Any]:
    """Return timm's config.json of a model: what rebuilds it and prepares its images, without its weights."""
    cfg = model.pretrained_cfg
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'config.json'
        model.pretrained_cfg = {key: value for key, value in cfg.items() if key not in _PROVENANCE}
        try:
            save_config_for_hf(
                model, str(path), model_config={'label_names': class_names or None}, data_config=data_config)
        finally:
            model.pretrained_cfg = cfg
        return json.loads(path.read_text())  # with lists for tuples, as whoever loads it will have it


def load_branches(
        source: str,
        sides: str | None = None,
        ema: bool | None = None,
        configs: dict[str, dict[str, Any]] | None = None,
) -> list[TrainedModel]:
    """Load branches of a pair from a checkpoint, or from a run's folder each from its own best epoch.

    Args:
        source: Checkpoint, or folder of a run.
        sides: 'a', 'b' or 'ab'; None for those that there are.
        ema: Averaged weights (True), raw ones (False), or those that the best epoch is chosen by (None): averaged
            ones where there are any, unless only the raw ones were evaluated.
        configs: timm's config by side, for a file of weights that does not say what they belong to.

    Raises:
        UsageError: There is no such file; it has no such branch or no averaged weights.
        RunError: A file can't be read or does not hold what it should.
    """
    loaded: list[TrainedModel] = []
    read: dict[str, dict] = {}
    for side, path in _checkpoint_files(source).items():
        if sides is not None and side not in sides:
            continue
        same = next((other for other in read if os.path.samefile(other, path)), path)  # links of one epoch
        checkpoint = read.setdefault(same, {}) or read_checkpoint(path, bare=True)
        read[same] = checkpoint
        branches = checkpoint.get('branches')
        if branches is None:
            branches = configs
        elif configs:
            _logger.warning(f'{path}: says itself which models it holds, --model-a and --model-b have no effect')
        if not branches:
            raise UsageError(
                f'{path}: does not say which models its weights belong to; name them: --model-a, --model-b (one or '
                f'both), --num-classes')
        if not isinstance(branches, dict) or not all(isinstance(config, dict) for config in branches.values()):
            raise RunError(f"{path}: its 'branches' are not those of a run")
        if side in branches:
            loaded.append(_load_branch(path, checkpoint, branches, side, ema))
    if not loaded:
        raise UsageError(f'{source}: has no branch {sides or ""}'.rstrip())
    return loaded


def _checkpoint_files(source: str) -> dict[str, str]:
    """Return the file to read each side from."""
    if os.path.isfile(source):
        return dict.fromkeys(SIDES, source)
    if not os.path.isdir(source):
        raise UsageError(f'{source}: no such file or folder')
    best = {side: path for side in SIDES if os.path.isfile(path := os.path.join(source, f'best_{side}.pth.tar'))}
    if len(best) == len(SIDES):
        return best
    # One model, or a run that was killed before its first epoch was ranked; a file half written is none.
    found = [path for path in Path(source).glob('*.pth.tar') if not path.name.endswith('tmp.pth.tar')]
    if not found:
        raise UsageError(f'{source}: no checkpoint in this folder (best_a.pth.tar, best_b.pth.tar, last.pth.tar, ...)')
    newest = max(found, key=lambda path: (path.name == 'last.pth.tar', path.stat().st_mtime_ns))
    if not best:
        _logger.warning(f'{source}: no branch has a best epoch yet, taking {newest.name}')
    return {side: best.get(side, str(newest)) for side in SIDES}


def _load_branch(path, checkpoint, branches, side, ema):
    averaged = 'state_dict_ema' in checkpoint
    if ema and not averaged:
        raise UsageError(f'--ema: {path} has no averaged weights')
    metrics = checkpoint.get('metrics')
    only_raw = isinstance(metrics, dict) and f'top1_{side}' in metrics and f'ema_top1_{side}' not in metrics
    use_ema = averaged and not only_raw if ema is None else ema
    config = branches[side]
    prefix = f'model_{side}.'
    state = clean_state_dict(checkpoint['state_dict_ema' if use_ema else 'state_dict'])
    state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    model = _build(config, path)
    try:
        model.load_state_dict(state)
    except RuntimeError as e:
        found = f'{len(state)} weights under {prefix}*' if state else f'no weights under {prefix}*'
        raise RunError(f'{path}: {found}, which do not fit {config["architecture"]} '
                       f'({" ".join(str(e).split())[:160]})') from e
    # What timm's saver stores as a Namespace says nothing of ours.
    known = {key: value for key in ('args', 'metrics') if isinstance(value := checkpoint.get(key), dict)}
    if not _is_plain(known) or not isinstance(known.get('args', {}).get('method', ''), str):
        raise RunError(f"{path}: its 'args' are not those of a run")
    if not all(isinstance(value, (int, float)) for value in known.get('metrics', {}).values()):
        raise RunError(f"{path}: its 'metrics' are not those of a run")
    return TrainedModel(
        model.eval(),
        source=path,
        architecture=config['architecture'],
        data_config=resolve_model_data_config(model),
        class_names=config.get('label_names'),
        side=side,
        ema=use_ema if averaged else None,
        checkpoint={
            **known,
            **({'epoch': checkpoint['epoch']} if isinstance(checkpoint.get('epoch'), int) else {}),
            'version': checkpoint.get('timm_vpl_version'),
            'architectures': {other: branches[other].get('architecture') for other in branches},
        },
    )


def _is_plain(value) -> bool:
    """Return whether a value is one that YAML can hold."""
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _build(config, where) -> nn.Module:
    """Build a model from timm's config, without weights."""
    if not _is_plain(config):
        raise RunError(f"{where}: its 'branches' are not those of a run")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / 'config.json').write_text(json.dumps(config))
        return create_named(f'local-dir:{folder}', where)


def create_named(name: str, where: str, **kwargs) -> nn.Module:
    """Create a model with timm.

    Raises:
        UsageError: timm can't; the message begins with `where`.
    """
    try:
        model = create_model(name, **kwargs)
    except Exception as e:  # timm checks little of what a config.json or a file of weights holds
        if isinstance(e.__cause__, pickle.UnpicklingError):
            raise UsageError(f'{where}: refused, a file of its weights holds more than tensors and plain types') from e
        raise UsageError(f'{where}: can not be built: {first_line(e, 300)}') from e
    if ':' in name:
        _check_config(model.pretrained_cfg, where)
    return model


def _is_number(value):
    return isinstance(value, (int, float)) and math.isfinite(value)


_VALID = {
    'architecture': lambda value: isinstance(value, str),
    'input_size': lambda value: len(value) == 3 and all(isinstance(size, int) and 0 < size <= 4096 for size in value),
    'mean': lambda value: len(value) > 0 and all(map(_is_number, value)),
    'std': lambda value: len(value) > 0 and all(_is_number(std) and std > 0 for std in value),
    'crop_pct': lambda value: _is_number(value) and value > 0,
    'crop_mode': lambda value: value in ('center', 'squash', 'border'),
    'interpolation': lambda value: value in ('random', *INTERPOLATIONS),
    'num_classes': lambda value: isinstance(value, int) and value >= 0,
    'label_names': lambda value: not isinstance(value, str) and all(isinstance(name, str) for name in value),
}


def _check_config(cfg: dict[str, Any], where: str) -> None:
    """Raise UsageError where a config.json of others says what timm would trip over later."""
    for key, valid in _VALID.items():
        value = cfg.get(key)
        try:
            good = value is None or valid(value)
        except TypeError:
            good = False
        if not good:
            raise UsageError(f'{where}: its configuration can not be right: {key} is {str(value)[:80]!r}')


def load_trained(source: str, ema: bool | None = None, side: str | None = None) -> list[TrainedModel]:
    """Load what a source names, with its trained weights.

    Args:
        source: Folder of a run or checkpoint (each branch, or that of `side`), folder of an export (also
            local-dir:DIR), hf-hub:ID, or a timm name (its pretrained weights).
        ema: As in `load_branches`.
        side: Branch of a pair, 'a' or 'b'.

    Raises:
        UsageError: There is nothing of this name.
        RunError: It can't be read.
    """
    if os.path.isfile(source) or (os.path.isdir(source) and not os.path.isfile(os.path.join(source, 'config.json'))):
        return load_branches(source, side, ema)
    name = f'local-dir:{source}' if os.path.isdir(source) else source
    model = create_named(name, source, pretrained=True).eval()
    cfg = model.pretrained_cfg
    return [TrainedModel(
        model,
        source=source,
        architecture=cfg.get('architecture', source),
        data_config=resolve_model_data_config(model),
        class_names=cfg.get('label_names'),
    )]
