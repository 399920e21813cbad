"""Trained models, each a plain timm model, from a run, a checkpoint, an export, the Hub or timm."""
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch.nn as nn
from timm.data import resolve_model_data_config
from timm.models import clean_state_dict

from ..core.methods import METHODS
from ..core.names import SIDES, partner_of
from ..core.teacher import Teacher
from ..errors import RunError, UsageError
from ..options.train import Options
from .boundary import refusing
from .checkpoint import read_checkpoint
from .models import create_named, first_difference, try_images

_logger = logging.getLogger(__name__)


class TrainedModel(NamedTuple):
    """A single trained model, in evaluation mode on the CPU, with its data configuration."""
    model: Any  # timm's
    source: str  # file, folder or name that it was read from
    architecture: str
    data_config: dict[str, Any]  # input_size, mean, std, interpolation, crop_pct, crop_mode
    class_names: list[str] | None = None
    side: Any = None  # of the pair that it was a branch of
    ema: bool | None = None  # whether these are averaged weights
    checkpoint: dict[str, Any] = {}  # other entries of the checkpoint: epoch, args, metrics, architectures by side

    @property
    def label(self) -> str:
        """Return a short name: the architecture, and of a branch the side and the kind of its weights."""
        if self.side is None:
            return self.architecture
        return f'{self.architecture} ({self.side}{"" if self.ema is None else ", EMA" if self.ema else ", raw"})'


def load_branches(source: str, sides: str | None = None, ema: bool | None = None) -> list[TrainedModel]:
    """Load branches of a pair from a checkpoint, or from a run's folder each from its own best epoch.

    Args:
        source: Checkpoint, or folder of a run.
        sides: 'a', 'b' or 'ab'; None for all.
        ema: Averaged weights (True), raw ones (False), or those that the best epoch is chosen by (None): averaged
            ones where there are any, unless only the raw ones were evaluated.

    Raises:
        UsageError: There is no such file, branch or averaged weights.
        RunError: A file can't be read or has other contents.
    """
    loaded: list[TrainedModel] = []
    read: dict[str, dict] = {}
    for side, path in _checkpoint_files(source).items():
        if sides is not None and side not in sides:
            continue
        same = next((other for other in read if os.path.samefile(other, path)), path)  # links of one epoch
        checkpoint = read[same] = read.get(same) or read_checkpoint(path)
        branches = checkpoint.get('branches')
        if not isinstance(branches, dict) or not all(isinstance(config, dict) for config in branches.values()):
            raise RunError(f"{path}: its models are not known, since its 'branches' are not those of a run")
        if side in branches:
            loaded.append(load_branch(path, checkpoint, side, ema))
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
    # One model, or a run that was killed before its first epoch was ranked; partial files do not count.
    found = list(Path(source).glob('*.pth.tar'))
    if not found:
        raise UsageError(f'{source}: no checkpoint in this folder (best_a.pth.tar, best_b.pth.tar, last.pth.tar, ...)')
    newest = max(found, key=lambda path: (path.name == 'last.pth.tar', path.stat().st_mtime_ns))
    if not best:
        _logger.warning(f'{source}: no branch has a best epoch yet, using {newest.name}')
    return {side: best.get(side, str(newest)) for side in SIDES}


def load_branch(path: str, checkpoint: dict[str, Any], side: str, ema: bool | None = None) -> TrainedModel:
    """Load a branch of a loaded checkpoint; `path` names it, the others are as in `load_branches`."""
    averaged = 'state_dict_ema' in checkpoint
    if ema and not averaged:
        raise UsageError(f'--ema: {path} has no averaged weights')
    metrics = checkpoint['metrics'] if isinstance(checkpoint.get('metrics'), dict) else {}
    only_raw = f'top1_{side}' in metrics and f'ema_top1_{side}' not in metrics
    use_ema = averaged and not only_raw if ema is None else ema
    branches = checkpoint['branches']
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
    args = checkpoint['args'] if isinstance(checkpoint.get('args'), dict) else {}  # not of timm's own script
    if not isinstance(args.get('method', ''), str):
        raise RunError(f"{path}: its 'args' are not those of a run")
    _as_json(args, path, 'args')
    if not all(isinstance(value, (int, float)) for value in metrics.values()):
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
            'args': args,
            'metrics': metrics,
            **({'epoch': checkpoint['epoch']} if isinstance(checkpoint.get('epoch'), int) else {}),
            'version': checkpoint.get('timm_vpl_version'),
            'architectures': {other: config.get('architecture') for other, config in branches.items()},
        },
    )


def _as_json(value: Any, path: str, key: str) -> str:
    """Return an entry of a checkpoint as JSON, which has only plain types.

    Raises:
        RunError: It has other types.
    """
    try:
        return json.dumps(value, sort_keys=True)
    except (TypeError, ValueError) as e:
        raise RunError(f"{path}: its '{key}' are not those of a run") from e


def _build(config, path) -> nn.Module:
    """Build a model from timm's config, without weights."""
    text = _as_json(config, path, 'branches')
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / 'config.json').write_text(text)
        return create_named(f'local-dir:{folder}', path)


def load_trained(source: str, ema: bool | None = None, side: str | None = None) -> list[TrainedModel]:
    """Load the models that a source names, with their trained weights.

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


def create_teacher(
        options: Options,
        data_config: dict[str, Any],
        num_classes: int,
        class_names: list[str] | None,
) -> Teacher | None:
    """Create the frozen teacher of a method that has one: instead of a branch, or beside two.

    Args:
        options: Options.
        data_config: Data configuration of the student's images.
        num_classes: Number of classes in the data.
        class_names: Names of the classes in the data, if they are known.

    Raises:
        UsageError: The teacher can't be read, is more than one model, or has other classes.
    """
    method = METHODS[options.method]
    if not method.has_teacher(options.own, options.sides):
        return None
    side = partner_of(options.sides[0]) if len(options.sides) == 1 else 'teacher'
    try:
        found = load_trained(options.own.teacher, side=options.own.teacher_branch)
    except (RunError, UsageError) as e:
        raise type(e)(f'--teacher: {e}') from e
    if len(found) > 1:
        found = [branch for branch in found if branch.side == side]
    if not found:
        raise UsageError(f'--teacher {options.own.teacher}: contains two models; choose one with --teacher-branch')
    [trained] = found
    if options.own.teacher_branch and trained.side is None:
        _logger.warning('--teacher-branch: no effect, the teacher is a single model')
    name = f'--teacher {options.own.teacher}: {trained.label}'
    channels = trained.data_config['input_size'][0]
    if channels != data_config['input_size'][0]:
        raise UsageError(f'{name} takes {channels} channels, but the data has {data_config["input_size"][0]}')
    if method.follows_teacher(options.own, options.sides):
        _check_classes(name, trained, num_classes, class_names)
    with refusing(f'{name} cannot teach', ValueError):
        teacher = Teacher(trained.model, side, trained.data_config, data_config)
    try_images(teacher, data_config['input_size'], name)
    _logger.info(f'Teacher: {trained.label} of {trained.source}')
    return teacher


def _check_classes(name: str, trained: TrainedModel, num_classes: int, class_names: list[str] | None) -> None:
    """Raise UsageError unless a teacher has the classes of the data."""
    known, difference = trained.model.num_classes, first_difference(trained.class_names, class_names)
    if not known:
        raise UsageError(f'{name} has no classifier, so only the terms tokens, embed and contrastive can follow it')
    if difference or known != num_classes:
        what = f'other classes, {difference}' if known == num_classes else (
            f'{known} classes, but the data has {num_classes}')
        raise UsageError(f'{name} has {what}; --method solo --model-a {trained.architecture} trains one on these')
