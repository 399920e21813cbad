"""The kinds of data sets, in one table: how each opens a split, as a timm reader, and what identifies it.

A further kind is a row of SOURCES; its `open` raises UsageError, also for options that it does not support
(--class-map, --input-key, --target-key), or any error of a file reader. Besides timm's `reader[index]` (a file or an
image, and its label; --check-data needs files), `len(reader)` and `reader.filename(index)` (None where images have no
name, which --real-labels needs), these attributes of a reader are used:

    class_to_idx: Index of each class, empty if the data does not name its classes.
    root: Folder or file of the images, None or absent if only the data set's name locates them.
    targets: Labels of the images in order, whole numbers from 0, absent if they are not known without reading.
    not_read: Number of files that are not read, by reason; absent for none.

A stream (`is_stream`) is read by its `Shards`, and its reader has `num_samples`, None where that is not known.
"""
import io
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from timm.data import create_dataset
from timm.data.readers.reader import Reader
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.utils.misc import natural_key

from ..compat import shard_decoder
from ..errors import UsageError
from ..options.checks import check_shards
from .folders import HIDDEN, LOOSE, check_folders, find_split, number_classes

_DIGITS_TRAIN = 1437  # first 80 %; the pictures are in the order of their writers


class Request(NamedTuple):
    """A requested split, by the options of the data set."""
    data: Any  # the options
    split: str
    batch_size: int
    seed: int
    is_training: bool
    whole: bool  # take a folder of class folders, or a tar, for the split itself
    flag: str  # option that names the split
    mode: str  # of the images
    class_map: dict[Any, int] | None

    @property
    def where(self) -> str:
        """The option that locates the data."""
        return f'--data-dir {self.data.data_dir}' if self.data.data_dir else f'--dataset {self.data.dataset}'

    def find(self) -> tuple:
        """Return what `find_split` does."""
        return find_split(self.data.data_dir, self.split, self.flag, self.whole, self.data.input_key)

    def create_dataset(self):
        """Return the split as a data set of timm's or torchvision's."""
        data = self.data
        return create_dataset(
            data.dataset,
            root=data.data_dir,
            split=self.split,
            is_training=self.is_training,
            class_map=self.class_map,
            download=data.dataset_download,
            batch_size=self.batch_size,
            seed=self.seed,
            num_samples=data.train_num_samples if self.is_training else data.val_num_samples,
            input_img_mode=self.mode,
            input_key=data.input_key,
            target_key=data.target_key,
            trust_remote_code=data.dataset_trust_remote_code,
        )


class DigitsReader(Reader):
    """The 1,797 handwritten digits that come with the package.

    Args:
        split: 'train' (1,437 images) or 'validation' (360).
    """

    def __init__(self, split: str = 'train'):
        super().__init__()
        with np.load(Path(__file__).parents[1] / 'assets' / 'digits.npz', allow_pickle=False) as archive:
            part = {'train': slice(_DIGITS_TRAIN), 'validation': slice(_DIGITS_TRAIN, None)}[split]
            self.images, self.targets = archive['images'][part], archive['labels'][part]
        self.class_to_idx = {str(digit): digit for digit in range(10)}

    def __getitem__(self, index):
        height, width = self.images[index].shape
        header = f'P5 {width} {height} 255\n'.encode()  # a PGM file: header and grey levels
        return io.BytesIO(header + (self.images[index] * 15).tobytes()), int(self.targets[index])

    def __len__(self):
        return len(self.targets)

    def _filename(self, index, basename=False, absolute=False):
        return f'{self.targets[index]}/{index}.pgm'


class FolderReader(ReaderImageFolder):
    """timm's reader, of a folder that was scanned.

    Args:
        root: The folder.
        samples: Path and label of each image.
        class_to_idx: Index of each class.
        not_read: Number of files that are not read, by reason.
    """

    def __init__(self, root: str, samples: list, class_to_idx: dict[Any, int], not_read=()):
        self.root, self.samples, self.class_to_idx, self.not_read = root, samples, class_to_idx, not_read
        self.targets = [target for _, target in samples]

    def _filename(self, index, basename=False, absolute=False):
        return self.samples[index][0][len(os.path.join(self.root, '')):]  # relpath takes ten times as long


class TarReader(ReaderImageInTar):
    """timm's reader of a tar, without hidden images and those in no folder.

    Args:
        root: The tar.
        number: Returns the index of each class for the folders of the images.
    """

    def __init__(self, root: str, number: Callable):
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


class ArrayReader(Reader):
    """torchvision's images without file names."""

    def __init__(self, dataset):
        super().__init__()
        self.dataset, self.root, self.class_to_idx = dataset, dataset.root, getattr(dataset, 'class_to_idx', {})
        self.targets = np.asarray(getattr(dataset, 'targets', ())).tolist()

    def _filename(self, index, basename=False, absolute=False):
        return None

    def __getitem__(self, index):
        return self.dataset[index]

    def __len__(self):
        return len(self.dataset)


class Part(Reader):
    """Some images of a reader, by their indices in it."""

    def __init__(self, reader, indices: Sequence[int]):
        super().__init__()
        self.reader, self.indices, self.class_to_idx = reader, indices, reader.class_to_idx
        if targets := list(getattr(reader, 'targets', ())):
            self.targets = [targets[index] for index in indices]

    def __getitem__(self, index):
        return self.reader[self.indices[index]]

    def __len__(self):
        return len(self.indices)

    def _filename(self, index, basename=False, absolute=False):
        return self.reader.filename(self.indices[index])


def _open_files(request: Request) -> Any:
    data, (root, images, not_read) = request.data, request.find()
    for key, value in (('--target-key', data.target_key), ('--input-key', images is None and data.input_key)):
        if value:
            raise UsageError(f'{key} {value}: does not apply to {root}')
    number = partial(number_classes, root=root, class_map=request.class_map, file=data.class_map)
    if images is None:
        return TarReader(root, number)
    check_folders(root, images, not_read, allow_empty=bool(data.class_map))
    class_to_idx = number(folder for folder, paths in images.items() if paths)
    samples = [(path, class_to_idx[os.path.basename(folder)]) for folder, paths in images.items() for path in paths]
    samples.sort()  # the sort that follows, timm's, keeps this order in ties
    samples.sort(key=lambda sample: natural_key(sample[0]))
    return FolderReader(root, samples, class_to_idx, not_read)


def _open_torchvision(request: Request) -> Any:
    data = request.data
    if data.class_map:
        raise UsageError(f'--class-map {data.class_map}: torchvision numbers the classes of {data.dataset} itself')
    if data.dataset.lower() in ('torch/folder', 'torch/image_folder'):
        request.find()
    dataset = request.create_dataset()
    hidden = [name for name in getattr(dataset, 'classes', ()) if isinstance(name, str) and name.startswith('.')]
    if hidden:
        raise UsageError(
            f'{request.where}: split {request.split!r} has a hidden folder {hidden[0]}, which is not a class; remove '
            f'it')
    samples = getattr(dataset, 'samples', None)
    return FolderReader(dataset.root, samples, dataset.class_to_idx) if samples else ArrayReader(dataset)


def _open_timm(request: Request) -> Any:
    return request.create_dataset().reader


def _open_shards(request: Request) -> Any:
    """Open shards with a webdataset that passes no address to a shell; their _info.json may be untrusted."""
    try:
        from webdataset import __version__ as version
    except ImportError as e:
        version = f'none ({e})'
    if not re.match('[1-9]', version):
        raise UsageError(
            f"--dataset {request.data.dataset}: needs webdataset 1.0 or later (pip install 'timm-vpl[wds]'), found "
            f"{version}")
    reader = _open_timm(request)  # reads only _info.json
    where, names = f'{request.where}: split {request.split!r} of _info.json:', reader.split_info.filenames
    if not names or not isinstance(reader.num_samples, int):
        raise UsageError(f'{where} {len(names)} shards, {reader.num_samples!r} samples')
    for name in map(str, names):
        check_shards(where, name)
        if '://' in request.data.data_dir and os.path.isabs(name):
            raise UsageError(f'{where} {name}: not below the address')
    reader.is_training, reader.dist_num_replicas = False, 1  # its samples are distributed here
    return reader


class _One(list):
    """One sample, instead of the data that timm's reader iterates over to make images and labels."""

    def set_epoch(self, epoch):
        """Have no epochs."""


def _find_tars(reader) -> list[tuple[str, int]]:
    names, lengths = reader.split_info.filenames, reader.split_info.shard_lengths
    known = len(lengths) == len(names) and all(isinstance(length, int) and length > 0 for length in lengths)
    return list(zip(names, lengths if known else [1] * len(names), strict=True))


def _read_tar(reader, shard: int) -> Iterable[dict]:
    from timm.data.readers.reader_wds import log_and_continue
    from webdataset import tarfile_to_samples  # an extra
    path = os.path.join(reader.root, reader.split_info.filenames[shard])
    return tarfile_to_samples(handler=log_and_continue)([{'url': path}])


def _decode_tar(reader, sample: dict) -> tuple | None:
    found = shard_decoder(reader)(sample)
    reader.ds = _One([] if found is None else [{'image': found['jpg'], 'target': found['target']}])
    return next(iter(reader), None)


def _open_rows(request: Request) -> Any:
    from datasets import Image  # an extra
    reader = _open_timm(request)
    reader.is_training = False
    if reader.download:
        whole = reader.builder.as_dataset(split=reader.split)
        rows = whole.to_iterable_dataset(num_shards=min(len(whole), 1024))
    else:
        rows = reader.builder.as_streaming_dataset(split=reader.split)
    reader.image = (rows.features or {}).get(reader.input_key)
    if isinstance(reader.image, Image):  # decoded by the worker that has it
        rows = rows.cast_column(reader.input_key, Image(decode=False))
    reader.rows = rows
    return reader


def _read_rows(reader, shard: int) -> Iterator[dict]:
    # Not its iterator, which in a worker skips other workers' samples by its own rule.
    for rows in reader.rows.shard(reader.rows.num_shards, shard).iter(64):
        yield from (dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True))


def _decode_row(reader, row: dict) -> tuple | None:
    if hasattr(reader.image, 'decode_example'):
        row = {**row, reader.input_key: reader.image.decode_example(row[reader.input_key])}
    reader.ds = _One([row])
    return next(iter(reader))


def _image_entries(reader) -> Iterator[str]:
    for index, target in enumerate(reader.targets):
        name = reader.filename(index)
        yield str(target) if name is None else f'{name}\0{target}'


def _hub_entries(reader) -> Iterator[str]:
    info = reader.dataset.info
    yield from (f'{info.version}', *sorted(info.download_checksums or ()))


def _stream_entries(reader) -> Iterator[str]:
    builder = getattr(reader, 'builder', None)  # of tfds and hfids
    yield f'{getattr(builder, "hash", "")} {getattr(getattr(builder, "info", None), "full_name", "")}'
    for name in getattr(getattr(reader, 'split_info', None), 'filenames', None) or ():
        path = os.path.join(str(reader.root or ''), str(name))
        yield f'{os.path.basename(path)}\0{os.path.getsize(path) if os.path.isfile(path) else ""}'


class Shards(NamedTuple):
    """How a stream is read shard by shard, so that its samples can be distributed over workers."""
    find: Callable[[Any], list[tuple[str, int]]]  # name and samples of each shard; 1 where these are not known
    read: Callable[[Any, int], Iterable]  # the samples of a shard, encoded
    decode: Callable[[Any, Any], tuple | None]  # image and target of a sample, None where timm leaves it out
    buffer: Callable[[Any], int]  # samples that are shuffled at a time


class Source(NamedTuple):
    """A kind of data set."""
    open: Callable[[Request], Any]  # returns a reader
    # Lines that identify a split, from its reader: by default only the names and labels of the images.
    entries: Callable[[Any], Iterator[str]] = _image_entries
    is_stream: bool = False  # images come in an order of the reader's own
    shards: Shards | None = None  # of a stream; without them the reader distributes its samples itself


# By the kind of --dataset KIND/NAME; options.DATASET_KINDS names them too.
SOURCES = {
    '': Source(_open_files),
    'digits': Source(
        lambda request: DigitsReader(request.split), lambda reader: (f'{name}\0' for name in reader.filenames())),
    'hfds': Source(_open_timm, _hub_entries),
    'hfids': Source(_open_rows, _stream_entries, is_stream=True, shards=Shards(
        lambda reader: [(f'shard {i}', 1) for i in range(reader.rows.num_shards)], _read_rows, _decode_row,
        attrgetter('shuffle_size'))),
    'tfds': Source(_open_timm, _stream_entries, is_stream=True),
    'torch': Source(_open_torchvision),
    'wds': Source(_open_shards, _stream_entries, is_stream=True, shards=Shards(
        _find_tars, _read_tar, _decode_tar, attrgetter('sample_shuffle_size'))),
}
