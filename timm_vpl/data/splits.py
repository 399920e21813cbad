"""Splits: opened by the options, described, and compared."""
import contextlib
import hashlib
import logging
import tarfile
import zipfile
import zlib
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.readers.class_map import load_class_map
from timm.loss import load_class_weights

from ..errors import UsageError, first_line
from ..options.sections import Source
from ..options.train import Options
from ..text import one_line
from .images import Images, Split, StreamImages
from .sources import SOURCES, Part, Request

_logger = logging.getLogger(__name__)
MIN_WITHHELD = 100


def create_split(
        data: Source,
        split: str,
        channels: int,
        batch_size: int = 1,
        seed: int = 0,
        is_training: bool = False,
        whole: bool = False,
        flag: str = '',
) -> Split:
    """Open one split of the data that the options name.

    Args:
        data: Options of the data set.
        split: Name of the split.
        channels: Channels of the images.
        batch_size: Images of a batch, for streams.
        seed: Seed of a stream's order.
        is_training: Whether it is trained on.
        whole: Take a folder of class folders, or a tar, for the split itself.
        flag: Option that names the split.

    Raises:
        UsageError: The data can't be read as asked.
    """
    mode = image_mode(data.input_img_mode, channels)
    class_map = read_class_map(data.class_map, data.data_dir or '') if data.class_map else None
    flag = flag or ('--train-split' if is_training else '--val-split')
    request = Request(data, split, batch_size, seed, is_training, whole, flag, mode, class_map)
    source = SOURCES[data.dataset.partition('/')[0].lower()]
    try:
        reader = source.open(request)
    except ImportError as e:
        raise UsageError(f'--dataset {data.dataset}: needs a package that is not installed ({e})') from e
    except (AssertionError, AttributeError, EOFError, KeyError, OSError, RuntimeError, TypeError, ValueError,
            tarfile.TarError, zipfile.BadZipFile, zlib.error) as e:
        raise UsageError(f'{request.where}: split {split!r} could not be read: {first_line(e, 400)}') from e
    dataset = StreamImages(reader, source) if source.is_stream else Images(reader, source, mode)
    if data.dataset != 'digits':  # which are always the same
        _log_card(request.where, split, split_card(dataset))
    return dataset


def image_mode(mode: str | None, in_chans: int) -> str:
    """Return the mode of images of so many channels, by default; or --input-img-mode.

    Raises:
        UsageError: The mode has another number of channels.
    """
    mode = mode or ('L' if in_chans == 1 else 'RGB')
    try:
        bands = len(Image.new(mode, (1, 1)).getbands())
    except ValueError as e:
        raise UsageError(f'--input-img-mode {mode}: not an image mode (L, RGB, RGBA, CMYK, ...)') from e
    if bands != in_chans:
        raise UsageError(f'--in-chans {in_chans}: images of mode {mode} have {bands}; give another --input-img-mode')
    return mode


def split_card(dataset: Split) -> dict[str, Any]:
    """Return what a split contains, as far as it is known without reading images.

    Returns:
        'images', their number or None; 'classes', the number of images of each class in the order of their indices;
        'not_read', the number of files by reason, or by ending.
    """
    reader, names = dataset.reader, class_names(dataset)
    counts = _class_counts(dataset, len(names or ()))
    classes = dict(zip(names or map(str, range(len(counts))), counts, strict=False))
    return {
        'images': reader.num_samples if dataset.source.is_stream else len(dataset),
        'classes': classes,
        'not_read': dict(getattr(reader, 'not_read', {})),
    }


def class_weights(asked: str, train: Split) -> torch.Tensor:
    """Return a weight for each class, float32, as --class-weights asks, and log their range.

    Args:
        asked: 'balanced', N / (C n_c) of C classes with n_c of the N images, so that the mean over the images is 1; or
            a file of numbers, with commas or blanks between them, or timm's JSON.
        train: The training images; their `num_classes` is known.

    Raises:
        UsageError: A class has no images, their numbers are not known, or a file does not contain the weights.
    """
    where, number = f'--class-weights {asked}', train.num_classes or 0
    names = class_names(train) or []
    names += map(str, range(len(names), number))
    if asked == 'balanced':
        counts = _class_counts(train, number)
        if not any(counts):
            raise UsageError(
                f'{where}: the data set does not give the number of images per class; use a file of weights')
        if 0 in counts:
            raise UsageError(f'{where}: class {names[counts.index(0)]} has no training images')
        weights = torch.tensor([sum(counts) / (number * count) for count in counts])
    else:
        try:
            weights = torch.atleast_1d(torch.as_tensor(load_class_weights(asked)))
        except (ArithmeticError, OSError, RuntimeError, TypeError, ValueError) as e:
            raise UsageError(f'{where}: {first_line(e)}') from e
        if len(weights) != number:
            raise UsageError(f'{where}: {len(weights)} weights, but the data has {number} classes')
    if not weights.any():
        raise UsageError(f'{where}: all weights are 0, so nothing would be learnt from the labels')
    least, most = int(weights.argmin()), int(weights.argmax())
    _logger.info(one_line(f'{where}: {weights[least]:.3g} ({names[least]}) to {weights[most]:.3g} ({names[most]})'))
    return weights


def _class_counts(dataset: Split, number: int) -> list[int]:
    """Return the number of images of each class, of at least so many classes; [] or zeros where it is not known."""
    targets = np.asarray(getattr(dataset.reader, 'targets', ()))
    known = targets.ndim == 1 and targets.dtype.kind in 'iu'
    return np.bincount(targets, minlength=number).tolist() if known else []


def _log_card(where, split, card):
    classes, not_read = card['classes'], card['not_read']
    text = f'{where}: split {split!r}: {card["images"]} images'
    if classes:
        few, many = (pick(classes, key=classes.get) for pick in (min, max))
        sizes = f'{classes[few]} ({few}) to {classes[many]} ({many})' if classes[few] < classes[many] else classes[few]
        text += f', {len(classes)} classes of {sizes}'
    if not_read:
        text += f'; not read: {", ".join(f"{count} {reason}" for reason, count in sorted(not_read.items())[:8])}'
    if not_read.keys() & Image.registered_extensions().keys():
        text += '; --input-key sets the endings that are read'
    _logger.log(logging.WARNING if not_read else logging.INFO, one_line(text))


def read_class_map(path: str, root: str = '') -> dict[Any, int]:
    """Return the class indices of a class map, a file at a path or in the folder of the data.

    Raises:
        UsageError: It is damaged, or its indices do not start at 0.
    """
    try:
        class_map = {
            name.removeprefix('\ufeff') if isinstance(name, str) else name: index
            for name, index in load_class_map(path, root).items()}
        indices = set(class_map.values())
        if '' in class_map:
            raise ValueError('a line without a name')
        if not indices or not all(isinstance(index, int) and 0 <= index < 1_000_000 for index in indices):
            raise ValueError('not a class index for each name')
        if path.lower().endswith('.txt') and len(indices) <= max(indices):
            raise ValueError('a name twice')
    except Exception as e:  # a damaged pickle raises anything
        raise UsageError(f'--class-map {path}: {first_line(e)}') from e
    return class_map


def names_of(class_to_idx: dict[str, int]) -> list[str]:
    """Return the names of classes in the order of their indices."""
    names = [str(index) for index in range(max(class_to_idx.values()) + 1)]
    for name, index in reversed(class_to_idx.items()):  # a class map may give several names one index: the first
        names[index] = str(name)
    return names


def class_names(dataset: Split) -> list[str] | None:
    """Return the names of a data set's classes in the order of their indices, None where it has no names."""
    class_to_idx = dataset.reader.class_to_idx
    return names_of(class_to_idx) if class_to_idx else None


def resolve_classes(options: Options, train: Split, held_out: Split) -> tuple[int, list[str] | None]:
    """Return how many classes two splits have, by --num-classes or by their names, and the names if any.

    After that the splits refuse other labels.

    Args:
        options: Options.
        train: The training images.
        held_out: The validation images.

    Raises:
        UsageError: The splits have different classes, or the data does not have --num-classes.
    """
    names, eval_names = class_names(train), class_names(held_out)
    if names and eval_names and names != eval_names:
        missing, extra = sorted(set(names) - set(eval_names))[:3], sorted(set(eval_names) - set(names))[:3]
        raise UsageError(
            f'--data-dir: {len(names)} classes in {options.data.train_split!r} and {len(eval_names)} in '
            f'{options.data.val_split!r} are not the same (only in the first: {missing}, only in the second: '
            f'{extra}), so their labels would differ')
    number = options.input.num_classes or len(names or ())
    if not number:
        raise UsageError('--num-classes: required, since the data set does not name its classes')
    if names and len(names) > number:
        raise UsageError(f'--num-classes {number}: the data has {len(names)} classes')
    if names and len(names) < number:
        _logger.warning(f'--num-classes {number}: the data has only {len(names)} classes')
    train.num_classes = held_out.num_classes = number
    return number, names


def withhold(images: Split, percent: float) -> tuple[Images, Images]:
    """Hold out a part of the training images, at least MIN_WITHHELD: by their number alone, the same for any seed.

    Args:
        images: The images.
        percent: Percentage of them to hold out.

    Returns:
        The images to train on, and those that are held out.

    Raises:
        UsageError: A stream, or too few images.
    """
    number = max(MIN_WITHHELD, round(len(images) * percent / 100))
    if isinstance(images, StreamImages) or 2 * number > len(images):
        why = 'of a stream' if isinstance(images, StreamImages) else f'of {len(images)} images, more than half'
        raise UsageError(
            f'--gate-pct {percent:g}: {number} {why}, cannot be held out; use --gate-split NAME')
    order = np.random.default_rng(0).permutation(len(images))
    rest, kept = (
        Images(Part(images.reader, np.sort(part).tolist()), images.source, images.mode, num_classes=images.num_classes)
        for part in (order[number:], order[:number]))
    return rest, kept


def shared_images(dataset: Images, other: Images) -> list[tuple[int, int]]:
    """Return the pairs of images of two data sets whose files have the same content; files of one size are read."""
    groups: list[Any] = [(range(len(dataset)), range(len(other)))]
    for key in (
            lambda file: file.seek(0, 2),
            lambda file: hashlib.sha256(file.read(4096)).digest(),
            lambda file: hashlib.sha256(file.read()).digest(),
    ):
        parts: dict[tuple, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
        for group, members in enumerate(groups):
            for side, indices in enumerate(members):
                for index in indices:
                    with contextlib.suppress(OSError), (dataset, other)[side].reader[index][0] as file:
                        parts[group, key(file)][side].append(index)
        groups = [part for part in parts.values() if all(part)]
    return sorted((index, twin) for indices, twins in groups for index in indices for twin in twins)
