"""Data sets and loaders: timm's, with every draw of the training pipeline seeded by its place in the run."""
import contextlib
import copy
import hashlib
import io
import logging
import multiprocessing
import os
import re
import signal
import struct
import tarfile
import threading
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm.data.auto_augment
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from timm.data import FastCollateMixup, ImageDataset, Mixup, create_dataset, create_loader
from timm.data.dataset_factory import _search_split
from timm.data.loader import PrefetchLoader
from timm.data.readers.class_map import load_class_map
from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader import Reader
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.utils.misc import natural_key
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, Subset, get_worker_info

from ..core.seeding import seed_all
from ..errors import RunError, UsageError, first_line
from ..options.options import check_shards, mixup_active
from ..text import one_line

_logger = logging.getLogger(__name__)
_skip_logger = logging.getLogger(f'{__name__}.skipped')
_skip_logger.setLevel(logging.WARNING)  # on every process: each reads files that the others do not

DIGITS = 'digits'
_DIGITS_TRAIN = 1437  # first 80 %; the pictures are in the order of their writers
MAX_SKIPPED = 10  # unreadable images in a row, after which a run ends
MAX_WARNINGS = 10  # of unreadable images, by each process that reads

# What a reader raises for one file that can't be read; other errors are not of an image.
READ_ERRORS = (
    OSError, EOFError, SyntaxError, TypeError, ValueError, struct.error, tarfile.TarError, zlib.error,
    Image.DecompressionBombError)

# What of a folder is not read, beside files by their ending.
HIDDEN = 'hidden (a name that begins with a dot)'
LOOSE = 'outside the class folders'
SPECIAL = 'pipes or devices'


class DigitsReader(Reader):
    """The 1,797 handwritten digits that come with the package, for timm's ImageDataset.

    Args:
        split: 'train' (1,437 images) or 'validation' (360).
    """

    def __init__(self, split: str = 'train'):
        super().__init__()
        if split not in ('train', 'validation'):
            raise ValueError(f"split is {split!r}, expected 'train' or 'validation'")
        with np.load(Path(__file__).parents[1] / 'assets' / 'digits.npz', allow_pickle=False) as archive:
            part = slice(_DIGITS_TRAIN) if split == 'train' else slice(_DIGITS_TRAIN, None)
            self.images, self.labels = archive['images'][part], archive['labels'][part]
        self.class_to_idx = {str(digit): digit for digit in range(10)}

    def __getitem__(self, index):
        height, width = self.images[index].shape
        header = f'P5 {width} {height} 255\n'.encode()  # a PGM file: header and grey levels
        return io.BytesIO(header + (self.images[index] * 15).tobytes()), int(self.labels[index])

    def __len__(self):
        return len(self.labels)

    def _filename(self, index, basename=False, absolute=False):
        return f'{self.labels[index]}/{index}.pgm'


class FolderReader(ReaderImageFolder):
    """timm's reader of a folder that was walked, in timm's order, with ties broken by the path itself.

    Args:
        root: The folder.
        images: Paths of the images of each folder in it.
        not_read: Files that are not read, by reason.
        number: Returns the index of each class for the folders of the images.
    """

    def __init__(self, root: str, images: dict[str, list[str]], not_read: Counter[str], number: Callable):
        self.root, self.not_read = root, not_read
        self.class_to_idx = number(folder for folder, paths in images.items() if paths)
        self.samples = [
            (path, self.class_to_idx[os.path.basename(folder)]) for folder, paths in images.items() for path in paths]
        self.samples.sort()  # the sort that follows keeps this order in ties
        self.samples.sort(key=lambda sample: natural_key(sample[0]))
        self.targets = [target for _, target in self.samples]


class TarReader(ReaderImageInTar):
    """timm's reader of a tar, without what is hidden or in no folder.

    Args:
        root: The tar.
        number: Returns the index of each class for the folders of the images.
    """

    def __init__(self, root: str, number: Callable[[list[str]], dict[str, int]]):
        super().__init__(root)
        self.not_read: Counter[str] = Counter()
        kept = []
        for image, _, tar in self.samples:
            name = os.path.splitext(os.path.basename(tar.name))[0] if tar else ''  # of a tar in the tar
            path = os.path.normpath(os.path.join(name, image.path))
            folder = os.path.dirname(path)
            kept.append('' if '/.' in f'/{path}' else folder)
            if not kept[-1]:
                self.not_read[HIDDEN if folder else LOOSE] += 1
        self.class_to_idx = number(filter(None, kept))
        self.samples = self.samples[[bool(folder) for folder in kept]]
        self.targets = [self.class_to_idx[os.path.basename(folder)] for folder in kept if folder]


class Replaced(int):
    """The label of an image that stands in for one that could not be read."""


class ReadableImages(Dataset):
    """A map-style data set in one image mode, where the next image stands in for one that can't be read.

    Attributes that it does not have are those of the data set.

    Args:
        dataset: timm's or torchvision's data set, without transforms.
        mode: Mode of the images.

    Raises:
        RunError: MAX_SKIPPED images in a row can't be read, or a label is none of the classes.
    """

    def __init__(self, dataset: Dataset, mode: str):
        self.dataset = dataset
        self.mode = mode
        self.transform = self.target_transform = self.num_classes = None
        self._num_warnings = 0
        if hasattr(dataset, 'loader'):  # torchvision's converts to RGB, which clips 16 bits
            dataset.loader = Image.open

    def __getattr__(self, name):
        if name == 'dataset' or name.startswith('__'):  # not there yet while it is unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        wanted = index
        for _ in range(MAX_SKIPPED):
            try:
                image, target = self._read(index)
                break
            except READ_ERRORS as e:
                cause = 'no image that Pillow knows' if isinstance(e, UnidentifiedImageError) else first_line(e)
                if self._num_warnings < MAX_WARNINGS:
                    self._num_warnings += 1
                    last = '; further ones are only counted' if self._num_warnings == MAX_WARNINGS else ''
                    _skip_logger.warning(f'Skipped sample {self._describe(index)}: {cause}{last}')
                failed, index = index, (index + 1) % len(self)
        else:
            raise RunError(
                f'data: Failed to load {MAX_SKIPPED} consecutive samples, the last {self._describe(failed)}: {cause}')
        label = self._label(target, index)
        if self.transform is not None:
            image = self.transform(image)
        return image, label if index == wanted else Replaced(label)

    def _read(self, index):
        """Return an image and its target; raise one of READ_ERRORS where the image is broken, RunError otherwise."""
        reader = getattr(self.dataset, 'reader', self.dataset)
        try:
            image, target = reader[index][:2]
        except READ_ERRORS:
            raise
        except KeyError as e:
            raise RunError(
                f'data: {self._describe(index)}: no {e} among the columns of the data, or in --class-map') from e
        except Exception as e:  # no fault of the image
            raise RunError(f'data: {self._describe(index)}: {type(e).__name__} {first_line(e)}') from e
        try:
            return _to_mode(image if isinstance(image, Image.Image) else Image.open(image), self.mode), target
        except READ_ERRORS:
            raise
        except MemoryError as e:
            raise RunError(f'data: {self._describe(index)}: the memory ran out (fewer --workers need less)') from e
        except Exception as e:  # what else Pillow raises for broken files has no common base
            raise OSError(first_line(e)) from e

    def _label(self, target, index):
        try:
            return _class_index(target, self.num_classes, self.target_transform)
        except ValueError as e:
            raise RunError(f'data: {self._describe(index)} has {e}') from e

    def _describe(self, index):
        try:
            name = self.dataset.filename(index) if hasattr(self.dataset, 'filename') else self.dataset.samples[index][0]
        except (AttributeError, KeyError, TypeError):
            name = None
        return f'index {index}' if name is None else f'{" ".join(str(name).splitlines())} (index {index})'


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Decode an image in a mode; of 16-bit grey the high byte, where Pillow would make all but the darkest white."""
    if image.mode[0] in 'FI' and mode[0] not in 'FI':
        values = np.asarray(image)
        if image.mode == 'F' or values.min() < 0 or values.max() > 0xffff:
            raise ValueError(f'pixels of mode {image.mode}, whose white is not known')
        image = Image.fromarray((values >> 8).astype(np.uint8))
    return image.convert(mode)


def _class_index(target, num_classes: int | None, transform: Callable[[int], int] | None = None) -> int:
    """Return a label, as the transform has it, if it is a class index; otherwise raise ValueError."""
    try:
        label = int(target)
        if label == target and label >= 0:
            label = label if transform is None else transform(label)
            if num_classes is None or 0 <= label < num_classes:
                return label
    except (IndexError, KeyError, OverflowError, TypeError, ValueError):
        pass
    classes = 'no class index' if num_classes is None else f'none of the {num_classes} classes, 0 to {num_classes - 1}'
    raise ValueError(f'the label {target!r}, {classes}')


class StreamLabels:
    """A target transform that refuses labels of a stream that are none of the classes, after another transform."""

    def __init__(self, num_classes: int, transform: Callable[[int], int] | None = None):
        self.num_classes = num_classes
        self.transform = transform

    def __call__(self, target):
        try:
            return _class_index(target, self.num_classes, self.transform)
        except ValueError as e:
            raise RunError(f'data: a sample of the stream has {e}') from e


def check_labels(dataset: Dataset, num_classes: int) -> None:
    """Let a data set of `create_split`, which has its target transform by now, refuse labels beyond the classes."""
    if isinstance(dataset, IterableDataset):
        dataset.target_transform = StreamLabels(num_classes, dataset.target_transform)
    else:
        dataset.num_classes = num_classes


def create_split(args, split: str, is_training: bool, whole: bool = False, flag: str = '') -> Dataset:
    """Create the data set of one split with timm's create_dataset, or from the embedded digits.

    Images that can't be read are replaced (`ReadableImages`), except those of streams.

    Args:
        args: Options of the data set.
        split: Name of the split.
        is_training: Whether it is trained on.
        whole: Take a folder of class folders, or a tar, for the split itself.
        flag: Option that names the split.

    Raises:
        UsageError: The data can't be read as asked.
    """
    in_chans = args.input_size[0] if args.input_size else args.in_chans or 3
    img_mode = args.input_img_mode or ('L' if in_chans == 1 else 'RGB')
    try:
        bands = len(Image.new(img_mode, (1, 1)).getbands())
    except ValueError as e:
        raise UsageError(f'--input-img-mode {img_mode}: not an image mode (L, RGB, RGBA, CMYK, ...)') from e
    if bands != in_chans:
        raise UsageError(
            f'--in-chans {in_chans}: images of mode {img_mode} have {bands}; name another --input-img-mode')
    if args.dataset == DIGITS:
        return ReadableImages(ImageDataset('', reader=DigitsReader(split)), img_mode)
    class_map = read_class_map(args.class_map, args.data_dir or '') if args.class_map else None
    if class_map and args.dataset.lower().startswith('torch/'):
        raise UsageError(f'--class-map {args.class_map}: torchvision numbers the classes of {args.dataset} itself')
    where = f'--data-dir {args.data_dir}' if args.data_dir else f'--dataset {args.dataset}'
    is_wds = args.dataset.lower().startswith('wds/')
    if is_wds:
        _check_webdataset(args.dataset)
    try:
        if args.dataset.lower() in ('', 'torch/folder', 'torch/image_folder'):
            flag = flag or ('--train-split' if is_training else '--val-split')
            root, images, not_read = _find_split(args, split, flag, whole)
        if args.dataset:
            dataset = create_dataset(
                args.dataset,
                root=args.data_dir,
                split=split,
                is_training=is_training,
                class_map=class_map,
                download=args.dataset_download,
                batch_size=args.batch_size,
                seed=args.seed,
                num_samples=args.train_num_samples if is_training else args.val_num_samples,
                input_img_mode=img_mode,
                input_key=args.input_key,
                target_key=args.target_key,
                trust_remote_code=args.dataset_trust_remote_code,
            )
        else:
            number = partial(_number_classes, args, root, class_map)
            reader = TarReader(root, number) if images is None else FolderReader(root, images, not_read, number)
            dataset = ImageDataset(root, reader=reader)
    except ImportError as e:
        raise UsageError(f'--dataset {args.dataset}: needs a package that is not installed ({e})') from e
    except (AssertionError, AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError,
            tarfile.TarError) as e:
        raise UsageError(f'{where}: split {split!r} could not be read: {first_line(e, 400)}') from e
    if is_wds:
        _check_info(dataset.reader, f'{where}: split {split!r} of _info.json:', '://' in args.data_dir)
    hidden = [name for name in getattr(dataset, 'classes', ()) if isinstance(name, str) and name.startswith('.')]
    if hidden:  # torchvision's
        raise UsageError(f'{where}: split {split!r} has a hidden folder {hidden[0]}, which is no class; remove it')
    _log_card(where, split, split_card(dataset))
    return dataset if isinstance(dataset, IterableDataset) else ReadableImages(dataset, img_mode)


def _check_webdataset(dataset: str) -> None:
    """Refuse versions of webdataset that give addresses to a shell."""
    try:
        from webdataset import __version__ as version
    except ImportError as e:
        version = f'none ({e})'
    if not re.match('[1-9]', version):
        raise UsageError(
            f"--dataset {dataset}: needs webdataset 1.0 or later (pip install 'timm-vpl[wds]'), found {version}")


def _check_info(reader: Reader, where: str, remote: bool) -> None:
    """Refuse what _info.json, which may be somebody else's, says of a split that webdataset has not opened yet."""
    names = reader.split_info.filenames
    if not names or not isinstance(reader.num_samples, int):
        raise UsageError(f'{where} {len(names)} shards, {reader.num_samples!r} samples')
    for name in map(str, names):
        check_shards(where, name)
        if remote and os.path.isabs(name):
            raise UsageError(f'{where} {name}: not below the address')


def read_class_map(path: str, root: str = '') -> dict[Any, int]:
    """Return the class indices of a class map, a file at a path or in the folder of the data.

    Raises:
        UsageError: It is damaged, or gives no index from 0 on.
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


def _find_split(args, split, flag, whole):
    """Return the folder or tar of a split, and of a folder the images by folder and what is not read."""
    root = _search_split(args.data_dir, split) if os.path.isdir(args.data_dir) else args.data_dir
    own = Path(root) != Path(args.data_dir)
    images = not_read = None
    if os.path.isdir(root) and (own or whole):
        types = args.input_key.lower().split(';') if args.input_key else get_img_extensions(as_set=True)
        images, not_read = scan_folder(root, set(types))
    if not own and not (whole and (images is None or not any(os.sep in folder for folder in images))):
        # timm falls back to all that is there, which would train and validate on the same images.
        if os.path.isfile(root):
            raise UsageError(
                f'--data-dir {root}: one tar for all splits; give its folder, and each split its own tar '
                f'({flag} {os.path.basename(root)})')
        entries = ', '.join(sorted(e.name for e in Path(root).iterdir() if e.is_dir() or e.suffix == '.tar')[:8])
        raise UsageError(f'{flag} {split}: no such folder or tar in {root}, which has {entries or "none"}')
    if args.dataset:
        return root, images, not_read
    for key, value in (('--target-key', args.target_key), ('--input-key', images is None and args.input_key)):
        if value:
            raise UsageError(f'{key} {value}: has no meaning for {root}')
    if images is not None:
        filled = {folder.split(os.sep)[0] for folder, paths in images.items() if paths}
        empty = sorted(folder for folder in images if os.sep not in folder and folder not in filled)
        if not filled:
            raise UsageError(f'--data-dir: Found 0 images in the folders of {root}; not read: {dict(not_read)}')
        if empty and not args.class_map:
            raise UsageError(f'--data-dir: class folder {os.path.join(root, empty[0])} holds no image; remove it from '
                             f'every split or fill it')
    return root, images, not_read


def scan_folder(root: str, types: set[str]) -> tuple[dict[str, list[str]], Counter[str]]:
    """Return the paths of the images of each folder in a folder, and how many files are not read, by reason.

    Args:
        root: The folder; images that lie in itself are not read.
        types: Endings of images.

    Raises:
        UsageError: A folder can't be read, or holds itself by a link, which timm would read 40 times.
    """
    images: dict[str, list[str]] = {}
    not_read: Counter[str] = Counter()
    pending: list[tuple[str, tuple]] = [(root, ())]
    try:
        while pending:
            folder, above = pending.pop()
            status = os.stat(folder)
            here = (status.st_dev, status.st_ino)
            if here in above:
                raise UsageError(f'--data-dir: {folder} is a link to a folder that it lies in; remove it')
            paths = images[os.path.relpath(folder, root)] = []
            with os.scandir(folder) as entries:
                for entry in entries:
                    name = entry.name
                    if name[0] == '.':
                        not_read[HIDDEN] += 1
                    elif _is_folder(entry):
                        pending.append((entry.path, (*above, here)))
                    elif (extension := os.path.splitext(name)[1].lower()) in types:
                        if _is_special(entry):  # reading it would wait for ever
                            not_read[SPECIAL] += 1
                        else:
                            paths.append(entry.path)
                    else:
                        not_read[extension or 'without an ending'] += 1
    except OSError as e:
        raise UsageError(f'--data-dir: {e.filename} can not be read ({e.strerror})') from e
    not_read[LOOSE] += len(images.pop('.'))
    return images, +not_read


def _is_special(entry: os.DirEntry) -> bool:
    """Return whether an entry is a pipe, a socket or a device; a link to nothing is not."""
    try:
        return not entry.is_file() and os.path.exists(entry.path)
    except OSError:  # a link to itself
        return False


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _number_classes(args, root: str, class_map: dict[str, int] | None, folders: Iterable[str]) -> dict[str, int]:
    """Return the index of each class, the name of a folder that holds images: timm's, but in a total order.

    Args:
        args: Options of the data set.
        root: Folder or tar of the data.
        class_map: Indices that are given.
        folders: The folders with images, as paths in the root.

    Raises:
        UsageError: The class map misses folders, or what lies in them is not one class a folder.
    """
    folders = set(folders)
    paths = defaultdict(list)
    for folder in sorted(folders):
        paths[os.path.basename(folder)].append(folder)
    if class_map is not None:
        missing = [path for name in paths.keys() - class_map for path in paths[name]]
        if missing:
            raise UsageError(
                f'--class-map {args.class_map}: misses {len(missing)} of the {len(folders)} folders with images in '
                f'{root} ({", ".join(sorted(missing)[:5])}); name them too, or remove them')
        return class_map
    for folder in sorted(folders):
        above = next((str(path) for path in Path(folder).parents if str(path) in folders), None)
        if above:
            raise UsageError(
                f'--data-dir: {root}: the folder {folder} would be a class beside {above}, which it lies in; move its '
                f'images, or name both in a --class-map')
    several = [f'{name} in {", ".join(each[:3])}' for name, each in paths.items() if len(each) > 1]
    if several and len(paths) == 1:
        raise UsageError(
            f'--data-dir: {root}: its {len(folders)} folders with images have one name, so that all would be one '
            f'class: {several[0]}; move the images up')
    if several:
        _logger.warning(one_line(
            f'{root}: {len(several)} classes are each of several folders of one name: {"; ".join(several[:3])}'))
    return {name: index for index, name in enumerate(sorted(paths, key=lambda name: (natural_key(name), name)))}


def split_card(dataset: Dataset) -> dict[str, Any]:
    """Return what a split holds, as far as its data set tells without reading images.

    Returns:
        'images', a number or None; 'classes', the images of each in the order of their indices; 'not_read', the number
        of files by the reason why, or by their ending.
    """
    while hasattr(dataset, 'dataset'):
        dataset = dataset.dataset
    source = getattr(dataset, 'reader', dataset)
    names, classes = class_names(dataset), {}
    targets = np.asarray(getattr(source, 'targets', getattr(source, 'labels', ())))
    if targets.ndim == 1 and targets.dtype.kind in 'iu':
        counts = np.bincount(targets, minlength=len(names or ())).tolist()
        classes = dict(zip(names or map(str, range(len(counts))), counts, strict=False))
    stream = isinstance(dataset, IterableDataset)
    return {
        'images': getattr(source, 'num_samples', None) if stream else len(dataset),
        'classes': classes,
        'not_read': dict(getattr(source, 'not_read', {})),
    }


def _log_card(where, split, card):
    classes, not_read = card['classes'], card['not_read']
    text = f'{where}: split {split!r}: {card["images"]} images'
    if classes:
        few, many = (pick(classes, key=classes.get) for pick in (min, max))
        text += f', {len(classes)} classes of {classes[few]} ({few}) to {classes[many]} ({many})'
    if not_read:
        text += f'; not read: {", ".join(f"{count} {reason}" for reason, count in sorted(not_read.items())[:8])}'
    if not_read.keys() & Image.registered_extensions().keys():
        text += '; --input-key names the endings that are read'
    _logger.log(logging.WARNING if not_read else logging.INFO, one_line(text))


def class_names(dataset) -> list[str] | None:
    """Return the names of a data set's classes in the order of their indices, None where it has no names."""
    class_to_idx = getattr(getattr(dataset, 'reader', dataset), 'class_to_idx', None)
    return names_of(class_to_idx) if class_to_idx else None


def names_of(class_to_idx: dict[str, int]) -> list[str]:
    """Return the names of classes in the order of their indices."""
    names = [str(index) for index in range(max(class_to_idx.values()) + 1)]
    for name, index in reversed(class_to_idx.items()):  # a class map may give several names one index: the first
        names[index] = str(name)
    return names


def resolve_classes(args, dataset_train, dataset_eval) -> list[str] | None:
    """Set args.num_classes from the data where it was not given, and return the classes' names if they are known.

    From now on the splits refuse other labels.

    Raises:
        UsageError: The splits have different classes, or the data does not have --num-classes.
    """
    names, eval_names = class_names(dataset_train), class_names(dataset_eval)
    if names and eval_names and names != eval_names:
        missing, extra = sorted(set(names) - set(eval_names))[:3], sorted(set(eval_names) - set(names))[:3]
        raise UsageError(
            f'--data-dir: {len(names)} classes in {args.train_split!r} and {len(eval_names)} in {args.val_split!r} '
            f'are not the same (only in the first: {missing}, only in the second: {extra}), so labels would disagree')
    if args.num_classes is None:
        if not names:
            raise UsageError('--num-classes: needed, the data set does not name its classes')
        args.num_classes = len(names)
    if names and len(names) > args.num_classes:
        raise UsageError(f'--num-classes {args.num_classes}: the data has {len(names)} classes')
    if names and len(names) < args.num_classes:
        _logger.warning(f'--num-classes {args.num_classes}: the data has only {len(names)} classes')
    for dataset in (dataset_train, dataset_eval):
        check_labels(dataset, args.num_classes)
    return names


class Place(NamedTuple):
    """Where in a run a sample is drawn: what its augmentation is seeded with."""
    epoch: int
    position: int  # in the order of the epoch over all processes
    index: int  # in the data set


class SeededSampler(Sampler):
    """The order of an epoch, from (seed, epoch) alone: whole batches, dealt to the processes in turn.

    Global batch k holds the same samples for any number of processes. With `repeats` an image stands that many times
    in a row, its copies with different processes where there are several, and an epoch keeps its length (timm's
    RepeatAugSampler).

    Args:
        num_samples: Length of the data set.
        batch_size: Batch size of a process.
        seed: Seed of the run.
        rank: Rank of the process.
        world_size: Number of processes.
        repeats: Copies of each image, 0 or 1 for none, not necessarily whole.
    """

    def __init__(self, num_samples, batch_size, seed=0, rank=0, world_size=1, repeats=0.):
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.repeats = repeats
        self.num_batches = num_samples // (batch_size * world_size)
        self.set_epoch(0)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Draw the order of an epoch and choose its first batch."""
        self.epoch = epoch
        self.first_batch = first_batch
        order = np.random.default_rng((self.seed, epoch)).permutation(self.num_samples)
        if self.repeats > 1:
            order = order[(np.arange(self.num_samples) / self.repeats).astype(np.int64)]
        self._indices = order[self.rank::self.world_size][:len(self)]

    def sample_ids(self, batch: int) -> torch.Tensor:
        """Return the data set indices (batch_size,) of this process's share of a batch."""
        return torch.from_numpy(self._indices[batch * self.batch_size:(batch + 1) * self.batch_size])

    def __len__(self):
        return self.num_batches * self.batch_size

    def __iter__(self) -> Iterator[Place]:
        for i in range(self.first_batch * self.batch_size, len(self)):
            yield Place(self.epoch, i * self.world_size + self.rank, int(self._indices[i]))


class SeededDataset(Dataset):
    """A map-style data set, read at a Place, whose transforms draw from generators seeded for that place."""

    def __init__(self, dataset, seed):
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, place: Place):
        seed_all(self.seed, 'sample', place.epoch, place.position)
        return (*self.dataset[place.index][:2], place)

    def __len__(self):
        return len(self.dataset)


def _num_replaced(batch) -> int:
    return sum(isinstance(sample[1], Replaced) for sample in batch)


class SeededCollate:
    """A collate function that draws (mixup in the workers) from generators seeded for the batch's first place.

    Args:
        collate: The collate function.
        seed: Seed of the run.
        mixup_off_epoch: Epoch from which mixup is off, 0 for never.
        skipped: Where to write how many images of each batch of the epoch are replaced, memory that workers share.
        global_batch_size: Batch size over all processes.
    """

    def __init__(self, collate, seed, mixup_off_epoch, skipped, global_batch_size):
        self.collate = collate
        self.seed = seed
        self.mixup_off_epoch = mixup_off_epoch
        self.skipped = skipped
        self.global_batch_size = global_batch_size

    def __call__(self, batch):
        epoch, position, _ = batch[0][2]
        self.skipped[position // self.global_batch_size] = _num_replaced(batch)
        seed_all(self.seed, 'batch', epoch, position)
        if isinstance(self.collate, Mixup) and self.mixup_off_epoch:
            # Here, since a worker that persists never sees what the main process sets later.
            self.collate.mixup_enabled = epoch < self.mixup_off_epoch
        return self.collate([sample[:2] for sample in batch])


class SeededErasing:
    """timm's random erasing, drawn from a generator that is seeded for the batch.

    Not a method of the loader: in a cycle of references torch can't end the workers, but waits 5 s for each.
    """

    def __init__(self, erasing, seed, rank, device):
        self.erasing = erasing
        self.seed, self.rank, self.device = seed, rank, device
        self.place = (0, 0)  # epoch, batch

    def __call__(self, input):
        epoch, batch = self.place
        self.place = (epoch, batch + 1)
        seed_all(self.seed, 'erase', epoch, batch, self.rank, device=self.device)
        return self.erasing(input)


class CountingCollate:
    """A collate function that counts the replaced images of a pass in memory that the workers share."""

    def __init__(self, collate, num_workers):
        self.collate = collate
        self.skipped = torch.zeros(max(1, num_workers), dtype=torch.int64).share_memory_()

    def __call__(self, batch):
        worker = get_worker_info()
        self.skipped[worker.id if worker else 0] += _num_replaced(batch)
        return self.collate(batch)


def _batches_of(loader) -> DataLoader:
    """Return torch's loader in one of timm's."""
    return loader.loader if isinstance(loader, PrefetchLoader) else loader


def _torch_loaders(loader) -> list[DataLoader]:
    """Return torch's loaders in any loader, none where it is just a sequence of batches."""
    loaders = loader.loaders.values() if isinstance(loader, PairEvalLoader) else [loader]
    return [each for each in map(_batches_of, loaders) if isinstance(each, DataLoader)]


def init_worker(worker_id: int, then: Callable[[int], None] | None = None) -> None:
    """Let a worker outlive the signals of its process group: the main process decides what they mean."""
    signal.set_wakeup_fd(-1)  # that of the main process, where this is a fork of it
    for name in ('SIGINT', 'SIGUSR1'):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, 'sigwaitinfo'):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_with_main, daemon=True).start()
    if then is not None:
        then(worker_id)


def _end_with_main() -> None:
    """End this worker when the main process sends SIGTERM, as Python does at its exit; from others it is ignored."""
    main = multiprocessing.parent_process().pid
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != main:
        pass
    os._exit(0)


class TrainLoader:
    """Batches of an epoch, on the device, from timm's loader.

    `skipped` is the number of images in the batches that `epoch` has yielded that could not be read, and are replaced,
    on this process.

    Every draw (order, augmentation, mixup, erasing) is a function of the seed and its place in the run, not of a
    generator's state: independent of the number of workers, and the same when an epoch is entered at a later batch.
    Data sets that are streams keep their reader's own order, and end for all processes with the shortest share.

    Args:
        loader: timm's training loader.
        args: Options of the run.
        device: Where batches go.
        mixup_fn: Mixup on the device, without a prefetcher.
    """

    def __init__(self, loader, args, device, mixup_fn=None):
        self.device = device
        self.mixup_fn = mixup_fn
        self.mixup_off_epoch = args.mixup_off_epoch
        self.seed, self.rank, self.world_size = args.seed, args.rank, args.world_size
        self.loader = loader
        self.sampler = None
        self.skipped = 0
        inner = _batches_of(loader)
        if not isinstance(inner.dataset, IterableDataset):
            self.sampler = SeededSampler(
                len(inner.dataset),
                args.batch_size,
                seed=args.seed,
                rank=args.rank,
                world_size=args.world_size,
                repeats=args.aug_repeats,
            )
            self._skipped = torch.zeros(self.sampler.num_batches, dtype=torch.int32).share_memory_()
            inner = DataLoader(
                SeededDataset(inner.dataset, args.seed),
                batch_size=args.batch_size,
                sampler=self.sampler,
                collate_fn=SeededCollate(
                    inner.collate_fn,
                    args.seed,
                    args.mixup_off_epoch,
                    skipped=self._skipped,
                    global_batch_size=args.batch_size * args.world_size,
                ),
                num_workers=inner.num_workers,
                pin_memory=inner.pin_memory,
                drop_last=True,
                worker_init_fn=init_worker,
                persistent_workers=inner.num_workers > 0,
            )
            if isinstance(loader, PrefetchLoader):
                self.loader.loader = inner
            else:
                self.loader = inner
        else:
            inner.worker_init_fn = partial(init_worker, then=inner.worker_init_fn)
        self.dataset = inner.dataset
        self.erasing = None
        if getattr(self.loader, 'random_erasing', None) is not None:
            self.erasing = SeededErasing(self.loader.random_erasing, args.seed, args.rank, device)
            self.loader.random_erasing = self.erasing

    def __len__(self):
        return len(self.loader)

    def epoch(self, epoch: int, first_batch: int = 0):
        """Yield (batch, input, target, sample_ids) from `first_batch` to the epoch's end.

        sample_ids (N,) is None unless images are repeated.
        """
        self.skipped = 0
        if self.erasing is not None:
            self.erasing.place = (epoch, first_batch)
        if self.sampler is not None:
            self.sampler.set_epoch(epoch, first_batch)
        elif hasattr(self.dataset, 'set_epoch'):
            self.dataset.set_epoch(epoch)
        repeated = self.sampler is not None and self.sampler.repeats > 1
        batches = read(self.loader)
        if self.sampler is None:
            batches = islice(batches, len(self) - first_batch)
            if self.world_size > 1:
                batches = together(batches, self.device)
        for batch, (input, target) in enumerate(batches, start=first_batch):
            if self.sampler is not None:
                self.skipped += int(self._skipped[batch])
            if not isinstance(self.loader, PrefetchLoader):
                input, target = input.to(self.device), target.to(self.device)
                if self.mixup_fn is not None:
                    self.mixup_fn.mixup_enabled = not self.mixup_off_epoch or epoch < self.mixup_off_epoch
                    seed_all(self.seed, 'batch', epoch, batch, self.rank)
                    input, target = self.mixup_fn(input, target)
            ids = self.sampler.sample_ids(batch).to(self.device, non_blocking=True) if repeated else None
            yield batch, input, target, ids


def together(batches, device: torch.device):
    """Yield a process's batches until those of any process end, so that all make as many steps."""
    batches = iter(batches)
    while True:
        batch = next(batches, None)
        ready = torch.tensor(batch is not None, dtype=torch.int32, device=device)
        torch.distributed.all_reduce(ready, op=torch.distributed.ReduceOp.MIN)
        if not ready.item():
            return
        yield batch


@contextlib.contextmanager
def data_errors():
    """Turn what a loader raises for bad data, or for a worker that died, into one line.

    That of a dead worker can come at any place of the main process, so that this goes around training as a whole.

    Raises:
        RunError: With the cause, and what to do.
    """
    try:
        yield
    except RunError as e:
        if '\n' not in str(e):
            raise
        # Of a worker: its traceback, with the message as the last line.
        raise RunError(str(e).strip().splitlines()[-1].removeprefix(f'{RunError.__module__}.RunError: ')) from e
    except (EOFError, OSError, RuntimeError) as e:
        # While a batch is awaited, torch says what killed a worker only as the cause.
        message = _worker_failure(f'{e.__cause__}') or _worker_failure(str(e))
        if message is None:
            raise
        raise RunError(message) from e


def _worker_failure(error: str) -> str | None:
    """Return what the error of a loader says of a worker that died, None if it is of something else."""
    last = (error.strip().splitlines() or [''])[-1].removeprefix('RuntimeError: ')
    if 'Communication with the workers' in error or ('</torch_' in error and 'open files' in error):
        return f'data: {last} (raise ulimit -n, or take fewer --workers)'
    if '</torch_' in error or 'signal: Bus error' in error:
        return f'data: {last} (enlarge /dev/shm, or take fewer --workers)'
    if 'signal: Killed' in error:
        return f'data: {last} (probably the memory ran out: fewer --workers need less)'
    if re.search(r'DataLoader worker \(pid|in pin memory thread|Pin memory thread exited', error):
        return f'data: {last} (what it printed is above; with --workers 0 the cause shows)'
    return None


def read(loader):
    """Yield a loader's batches of a pass, and count what is skipped in it anew.

    Raises:
        RunError: Bad data, or a worker that died, with one line.
    """
    loaders = _torch_loaders(loader)
    for each in loaders:
        if isinstance(each.collate_fn, CountingCollate):
            each.collate_fn.skipped.zero_()
    with data_errors():
        try:
            yield from loader
        except (ConnectionError, EOFError) as e:
            if 'DataLoader worker' in str(e) or not any(each.num_workers for each in loaders):
                raise
            time.sleep(2)  # a worker died while it sent a batch: torch is about to raise what killed it
            raise RunError(f'data: the connection to a loader worker is lost ({first_line(e)})') from e


def shared_images(dataset: Dataset, other: Dataset) -> list[tuple[int, int]]:
    """Return the pairs of images of two data sets whose files have the same content; files of one size are read."""
    groups = [(range(len(dataset)), range(len(other)))]
    for key in (
            lambda file: file.seek(0, 2),
            lambda file: hashlib.sha256(file.read(4096)).digest(),
            lambda file: hashlib.sha256(file.read()).digest(),
    ):
        parts: dict[tuple, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
        for group, members in enumerate(groups):
            for side, indices in enumerate(members):
                for index in indices:
                    with contextlib.suppress(OSError), _open_file((dataset, other)[side], index) as file:
                        parts[group, key(file)][side].append(index)
        groups = [part for part in parts.values() if all(part)]
    return sorted((index, twin) for indices, twins in groups for index in indices for twin in twins)


def _open_file(dataset, index):
    while hasattr(dataset, 'dataset'):
        index = dataset.indices[index] if isinstance(dataset, Subset) else index
        dataset = dataset.dataset
    return dataset.reader[index][0] if hasattr(dataset, 'reader') else open(dataset.samples[index][0], 'rb')


def skipped_images(loader) -> int:
    """Return how many images of the last pass over a validation loader could not be read, on this process."""
    collates = [each.collate_fn for each in _torch_loaders(loader)]  # of a pair's loaders, each reads all images
    return max((int(each.skipped.sum()) for each in collates if isinstance(each, CountingCollate)), default=0)


def create_train_loader(args, dataset, data_config: dict, device: torch.device) -> TrainLoader:
    """Create the training loader from timm's options.

    Raises:
        UsageError: An augmentation policy that timm does not know, or fewer images than a batch.
    """
    _guard_posterize()
    collate_fn = mixup_fn = None
    if mixup_active(args):
        mixup_args = {
            'mixup_alpha': args.mixup,
            'cutmix_alpha': args.cutmix,
            'cutmix_minmax': args.cutmix_minmax,
            'prob': args.mixup_prob,
            'switch_prob': args.mixup_switch_prob,
            'mode': args.mixup_mode,
            'label_smoothing': args.smoothing,
            'num_classes': args.num_classes,
        }
        if args.prefetcher:
            collate_fn = FastCollateMixup(**mixup_args)
        else:
            mixup_fn = Mixup(**mixup_args)
    interpolation = args.train_interpolation
    if args.no_aug or not interpolation:
        interpolation = data_config['interpolation']
    try:
        loader = create_loader(
            dataset,
            input_size=data_config['input_size'],
            batch_size=args.batch_size,
            is_training=True,
            no_aug=args.no_aug,
            re_prob=args.reprob,
            re_mode=args.remode,
            re_count=args.recount,
            re_split=args.resplit,
            train_crop_mode=args.train_crop_mode,
            scale=args.scale,
            ratio=args.ratio,
            hflip=args.hflip,
            vflip=args.vflip,
            color_jitter=args.color_jitter,
            color_jitter_prob=args.color_jitter_prob,
            grayscale_prob=args.grayscale_prob or 0.,
            gaussian_blur_prob=args.gaussian_blur_prob or 0.,
            auto_augment=args.aa,
            interpolation=interpolation,
            mean=data_config['mean'],
            std=data_config['std'],
            num_workers=args.workers,
            collate_fn=collate_fn,
            pin_memory=args.pin_mem,
            device=device,
            use_prefetcher=args.prefetcher,
        )
    except (AssertionError, KeyError, ValueError) as e:
        raise UsageError(f'--aa {args.aa}: not an augmentation policy of timm ({type(e).__name__} {e})') from e
    loader = TrainLoader(loader, args, device, mixup_fn=mixup_fn)
    if loader.sampler is not None and not len(loader):
        raise UsageError(
            f'--batch-size {args.batch_size}: {args.world_size} batch(es) of it are more than the '
            f'{loader.sampler.num_samples} training images')
    return loader


class PairEvalLoader:
    """Validation batches of branches that differ in how their images are prepared: ({side: images}, target).

    Args:
        loaders: timm's validation loader of each side, over the same images in the same order.
    """

    def __init__(self, loaders: dict[str, Any]):
        self.loaders = loaders
        first = next(iter(loaders.values()))
        self.dataset, self.sampler = first.dataset, first.sampler

    def __len__(self):
        return len(next(iter(self.loaders.values())))

    def __iter__(self):
        for batches in zip(*self.loaders.values(), strict=True):
            yield {side: images for side, (images, _) in zip(self.loaders, batches, strict=True)}, batches[0][1]


def create_eval_loaders(args, dataset, configs: dict[str, dict], device: torch.device):
    """Create the validation loader of a pair: timm's own where both branches' images are prepared alike."""
    first, *others = configs.values()
    if all(config == first for config in others):
        return create_eval_loader(args, dataset, first, device)
    # A loader gives its data set the transform, so each has its own.
    return PairEvalLoader({
        side: create_eval_loader(args, copy.copy(dataset), config, device) for side, config in configs.items()})


def create_eval_loader(args, dataset, data_config: dict, device: torch.device):
    """Create timm's validation loader: each image once, in order, dealt to the processes in turn.

    `skipped_images` counts those that could not be read.
    """
    loader = create_loader(
        dataset,
        input_size=data_config['input_size'],
        batch_size=args.validation_batch_size or args.batch_size,
        is_training=False,
        interpolation=data_config['interpolation'],
        mean=data_config['mean'],
        std=data_config['std'],
        num_workers=args.workers,
        distributed=args.distributed,
        crop_pct=data_config['crop_pct'],
        crop_mode=data_config['crop_mode'],
        pin_memory=args.pin_mem,
        device=device,
        use_prefetcher=args.prefetcher,
    )
    inner = _batches_of(loader)
    inner.collate_fn = CountingCollate(inner.collate_fn, args.workers)
    inner.worker_init_fn = partial(init_worker, then=inner.worker_init_fn)
    return loader


def _guard_posterize() -> None:
    """Let timm's posterize take 0 bits again, which Pillow 13 refuses: a black image, as before."""
    operations = timm.data.auto_augment.NAME_TO_OP
    for name in ('Posterize', 'PosterizeIncreasing', 'PosterizeOriginal'):
        operations[name] = _posterize


def _posterize(img: Image.Image, bits_to_keep: int, **_) -> Image.Image:
    if bits_to_keep >= 8:
        return img
    if bits_to_keep < 1:
        return Image.new(img.mode, img.size)
    return ImageOps.posterize(img, bits_to_keep)
