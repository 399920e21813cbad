"""Cheap checks of options: contradictions, and names of things that do not exist."""
import functools
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.methods import METHODS
from ..core.names import SIDES
from ..errors import UsageError
from .parser import as_given, did_you_mean, flag_of, show
from .sections import DATASET_KINDS, Source

if TYPE_CHECKING:
    from .train import Options

REGISTERED = re.compile(r'@register_model\ndef (\w+)\(')  # a model, in timm's sources


def check(options: 'Options', given: Mapping[str, Any]) -> None:
    """Raise UsageError where options contradict each other or name something that is not there.

    Args:
        options: The options.
        given: What was given, by dest.
    """
    try:
        _check(options, given)
    except UsageError as error:
        raise UsageError(as_given(str(error), given)) from None


def _check(options: 'Options', given: Mapping[str, Any]) -> None:
    _check_models(options)
    _check_method(options, given)
    if options.data.train_split == options.data.val_split:
        raise UsageError(
            f'--train-split and --val-split are both {options.data.val_split}: validation would use training images')
    check_dataset(options.data, ('train_split', 'val_split'))
    if options.data.gate_split == options.data.train_split:
        raise UsageError(f'--gate-split {options.data.gate_split}: a gate needs images that are not trained on')
    _check_run(options)
    _check_images(options)
    try:
        METHODS[options.method].check(options.own, options.sides)
    except ValueError as e:
        raise UsageError(f'--method {options.method}: {e}') from None
    x, y = getattr(options.own, 'x', 0), getattr(options.own, 'y', 0)
    if Fraction(str(x)) + Fraction(str(y)) > 100:  # the decimals as written: 33.4 + 66.6 is 100
        hint = ''.join(
            f'; --{name} is at its default, use at most --{name} {100 - other:g}'
            for name, other in (('x', y), ('y', x)) if name not in given and other <= 100)
        raise UsageError(f'--x {x:g} and --y {y:g} add up to more than 100 percent of the epochs{hint}')


def _check_run(options: 'Options') -> None:
    run = options.run
    files = {f'{name}_{side}': getattr(branch, name) for side, branch in options.branches.items()
             for name in ('initial_checkpoint', 'pretrained_path')}
    if options.augmentation.class_weights != 'balanced':
        files['class_weights'] = options.augmentation.class_weights
    for dest, path in {**files, 'resume': '' if is_auto(run.resume) else run.resume}.items():
        if path and not os.path.isfile(path):
            raise UsageError(f'{flag_of(dest)} {path}: no such file')
    for side, branch in options.branches.items():
        if run.log_grad_terms and branch.grad_checkpointing:  # BatchNorm would see the images again
            raise UsageError(
                f'--log-grad-terms {run.log_grad_terms}: its backward passes would repeat the forward pass of '
                f'--grad-checkpointing-{side} and change running statistics; use only one of them')
    _check_experiment(run.experiment)
    if run.resume == 'auto' and not run.experiment:
        raise UsageError("--resume auto needs --experiment NAME: without it a run's folder has a new name each time")


def _check_images(options: 'Options') -> None:
    augmentation, mode = options.augmentation, options.data.input_img_mode
    for dest in ('scale', 'ratio', 'cutmix_minmax'):
        values = getattr(augmentation, dest)
        if values and values[0] > values[1]:
            raise UsageError(f'{flag_of(dest)} {show(values)}: the first is larger than the second')
    if augmentation.mixes and options.loader.batch_size % 2:
        raise UsageError(f'--batch-size {options.loader.batch_size} is odd, --mixup and --cutmix need an even one')
    if mode not in (None, 'L', 'RGB') and augmentation.aa and not augmentation.no_aug:
        raise UsageError(
            f'--aa {augmentation.aa}: needs images of mode L or RGB, not --input-img-mode {mode}; use --aa none')
    channels = options.input.channels
    for flag, values in ((f'--{name}-{side}', getattr(branch, name)) for side, branch in options.branches.items()
                         for name in ('mean', 'std')):
        if values and len(values) not in (1, channels):
            raise UsageError(f'{flag} {show(values)} has {len(values)} values, the images have {channels} channels')


def is_auto(resume: str) -> bool:
    """Return whether --resume asks for the newest checkpoint of a folder."""
    return resume == 'auto' or os.path.isdir(resume)


def _check_experiment(name: str) -> None:
    """Raise UsageError unless a name, which becomes part of a path, is that of a visible folder."""
    if name and (
            not name.isprintable() or re.search(r'[/\\]', name) or name[0] in '.-~' or name != name.strip()
            or len(name.encode()) > 200):
        raise UsageError(
            f'--experiment {name!r}: expected the name of a folder, not a path: no / or \\, no . - ~ at its start, at '
            f'most 200 bytes')


def _check_models(options: 'Options') -> None:
    models = METHODS[options.method].models
    if len(options.sides) not in models:
        if models == (2,):
            missing = ' and '.join(f'--model-{side}' for side in SIDES if side not in options.sides)
            raise UsageError(f'--method {options.method} needs two models; missing: {missing}')
        wanted = 'one model' if models == (1,) else 'one or two models'
        raise UsageError(
            f"--method {options.method} needs {wanted}, --model-a or --model-b; given: {_models(options) or 'none'}"
            " (--model-b '' removes that of a recipe)")
    for side, branch in options.branches.items():
        check_model_name(f'--model-{side}', branch.model or '')


def _models(options: 'Options') -> str:
    return ' '.join(f'--model-{side} {branch.model}' for side, branch in options.branches.items())


def _check_method(options: 'Options', given: Mapping[str, Any]) -> None:
    name, method = options.method, METHODS[options.method]
    teacher = given.get('teacher')
    if method.has_teacher(options.own, options.sides) and not teacher:
        other = ', or a second model that teaches while it learns' if 2 in method.models else ''
        raise UsageError(
            f"--method {name}: needs --teacher (a run's folder, a checkpoint, an exported folder, hf-hub:ID or a timm "
            f'name){other}')
    if teacher and not method.has_teacher(options.own, options.sides):
        why = 'has two models, the teacher is the partner' if 2 in method.models else 'has no teacher'
        raise UsageError(f'--teacher {teacher}: --method {name} {why}')
    if teacher:
        check_trained('--teacher', teacher)
    if method.distilled(options.own) and not any(
            side in method.distilled(options.own) and _may_have_token(branch.model or '')
            for side, branch in options.branches.items()):
        raise UsageError(f'--method {name}: {_models(options)} {no_token()}')
    for branch in options.branches.values() if method.uniform_drop_path else ():
        rate = branch.drop_path or branch.drop_connect or 0
        if not 0 < rate < 1:
            raise UsageError(
                f'--drop-path {rate:g}: --method {name} needs a rate above 0 and below 1, since only drop path makes '
                f'its two submodels differ')
    if method.updates(options.own) > 1:
        _check_phases(options)


def _check_phases(options: 'Options') -> None:
    name, asked = options.method, options.optimizer
    if asked.grad_accum_steps > 1:
        raise UsageError(
            f'--grad-accum-steps {asked.grad_accum_steps}: --method {name} updates one branch before the other within '
            f'a batch; use 1, or --dml-joint')
    if asked.opt.startswith('lookahead'):
        raise UsageError(
            f'--opt {asked.opt}: --method {name} updates one branch before the other, which Lookahead would count as '
            f'two steps; use another optimizer, or --dml-joint')


def check_trained(flag: str, name: str) -> None:
    """Raise UsageError unless a trained model is a file, a folder or the name of a model."""
    if os.path.exists(name):
        return
    if os.path.dirname(name) and ':' not in name:
        raise UsageError(f'{flag} {name}: no such file or folder (on the Hub: hf-hub:{name})')
    check_model_name(flag, name)


def no_token() -> str:
    """Return the end of a line about a model without a distillation token."""
    families = {name.partition('_')[0]: name for name in sorted(distilled_model_names(), reverse=True)}
    return (f'has no distillation token; timm models that have one: {", ".join(sorted(families.values()))} and others '
            f'of these families')


def _may_have_token(name: str) -> bool:
    """Return whether a model may have a distillation token; a model that is not timm's is checked later."""
    return ':' in name or name.partition('.')[0] in distilled_model_names()


@functools.cache
def distilled_model_names() -> frozenset[str]:
    """Return the timm models that may have a distillation token: those of files with its switch, named so if any is."""
    names: set[str] = set()
    for text in _timm_sources():
        if 'def set_distilled_training' in text:
            found = REGISTERED.findall(text)
            names.update([name for name in found if '_dist' in name] or found)
    return frozenset(names)


def check_model_name(flag: str, name: str) -> None:
    """Raise UsageError unless a model's name is one of timm's, hf-hub:ID or local-dir:FOLDER."""
    source, colon, place = name.partition(':')
    if colon:
        source = source.lower().replace('_', '-')
        if source not in ('hf-hub', 'local-dir') or not place:
            raise UsageError(f'{flag} {name} is not the name of a timm model, hf-hub:ID or local-dir:FOLDER')
        if source == 'local-dir' and not os.path.isdir(place):
            raise UsageError(f'{flag} {name}: no such folder')
    elif '/' in name or '\\' in name:
        raise UsageError(f'{flag} {name} is not the name of a timm model (hf-hub:{name} or local-dir:{name}?)')
    else:
        arch = name.partition('.')[0]
        names = timm_model_names()
        if arch not in names and not _is_renamed(arch):
            raise UsageError(f'{flag} {name}: timm has no model of this name{did_you_mean(arch, names)}')


def _timm_sources() -> Iterator[str]:
    """Yield the text of timm's model files, without importing timm."""
    from importlib.util import find_spec
    spec = find_spec('timm')
    if spec is None or spec.submodule_search_locations is None:
        raise UsageError('timm is not installed (pip install timm)')
    for path in sorted(Path(spec.submodule_search_locations[0], 'models').glob('*.py')):
        yield path.read_text(encoding='utf-8')


@functools.cache
def timm_model_names() -> frozenset[str]:
    """Return the names of the models that timm registers."""
    return frozenset(name for text in _timm_sources() for name in REGISTERED.findall(text))


def _is_renamed(name: str) -> bool:
    """Return whether timm still takes this as an old name of a model."""
    return any(f"'{name}': '" in text.partition('register_model_deprecations(')[2] for text in _timm_sources())


def check_dataset(source: Source, splits: Sequence[str]) -> None:
    """Raise UsageError where the data set that the options name, or one of its splits, can't be.

    Args:
        source: The options.
        splits: Names of those that name a split.
    """
    kind, place = source.dataset.partition('/')[0].lower(), source.data_dir
    named = {dest: name for dest in splits if (name := getattr(source, dest)) is not None}
    names = named.values()
    if place and (kind == 'wds' or '://' in place):
        check_shards('--data-dir', place)
    for dest, name in named.items() if kind == 'wds' else ():
        check_shards(flag_of(dest), name, is_split=True)
    if source.class_map and not any(
            os.path.isfile(path) for path in (source.class_map, os.path.join(place or '', source.class_map))):
        raise UsageError(f'--class-map {source.class_map}: no such file')
    if kind == 'digits' and place:
        raise UsageError(f'--dataset digits comes with the package, but a folder is given: {place}')
    if kind == 'digits' and not set(names) <= {'train', 'validation'}:
        raise UsageError(f'split {" or ".join(names)}: the digits have the splits train and validation')
    if source.dataset not in ('', 'digits') and not (kind in DATASET_KINDS and source.dataset.partition('/')[2]):
        kinds = ', '.join(f'{kind}/NAME' for kind in DATASET_KINDS)
        raise UsageError(f'--dataset {source.dataset} is not one of digits, {kinds}; leave it out for a folder or .tar')
    if kind not in ('digits', 'hfds', 'hfids', 'tfds'):  # which find their data without a folder
        _check_folder(source, kind, place)


def _check_folder(source: Source, kind: str, place: str | None) -> None:
    if not place:
        wanted = f'the folder of {source.dataset}' if source.dataset else 'a folder or .tar of images'
        raise UsageError(f'no data: give {wanted} (DIR or --data-dir), or try --dataset digits')
    if (kind == 'torch' and source.dataset_download) or (kind == 'wds' and '://' in place):
        return
    if not os.path.exists(place):
        raise UsageError(f'data folder {place} does not exist')
    if not os.path.isdir(place) and not (not kind and place.endswith('.tar') and os.path.isfile(place)):
        raise UsageError(f"data {place} is not a folder{'' if kind else ' or .tar'}")


# What webdataset may open: a path or an address, of characters that a shell does not interpret anywhere.
SHARD = re.compile(r'((https?|ftps|sftp|scp|gs|htgs|ais|file)://[\w.-]*(:\d+)?(?=/|$))?[\w.,/+=%-]*')
MAX_SHARDS = 1_000_000  # of a split


def check_shards(where: str, text: str, is_split: bool = False) -> None:
    """Raise UsageError unless webdataset may open what a text names.

    Args:
        where: Who names it, for the message.
        text: Folder or shard; or a split, whose shards can be several: 'x-{00..12}.tar::y-{a,b}.tar|64'.
        is_split: Whether it is a split.
    """
    count = 0
    for name in re.sub(r'\|\d+$', '', text).split('::') if is_split else [text]:
        parts = re.split(r'\{(\d{1,9}\.\.\d{1,9}|[^{}]*,[^{}]*)\}', name) if is_split else [name]
        if not all(map(SHARD.fullmatch, parts)):
            shown = '' if re.search('[@?]', text) else f' {text}'  # it may hold a secret
            raise UsageError(
                f'{where}{shown}: not the name of a shard: it has letters, digits and _-.,/+=% only; an address begins '
                f'with https://, ftps://, sftp://, scp://, gs://, ais:// or file:// and has no user name, password or '
                f'query (not pipe:, which runs in a shell; not hf://, which shows the token of the Hub)')
        count += math.prod(
            group.count(',') + 1 if ',' in group else abs(int(group.split('..')[0]) - int(group.split('..')[1])) + 1
            for group in parts[1::2])
    if count > MAX_SHARDS:
        raise UsageError(f'{where} {text}: {count} shards are more than the limit of {MAX_SHARDS}')
