"""Images and labels: which image replaces one that can't be read, and which labels are refused."""
import copy
import logging
import random
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ..core.processes import Processes
from ..core.seeding import derive_seed, seed_all
from ..errors import RunError, UsageError, first_line
from .order import SampleDraw, part_of, shuffled
from .sources import Source

_logger = logging.getLogger(__name__)
_logger.setLevel(logging.WARNING)  # on every process: each reads files that the others do not

MAX_SKIPPED = 10  # unreadable images in a row, after which a run ends
MAX_WARNINGS = 10  # of unreadable images, by each process that reads
MAX_WORKERS = 1024  # whose reading is monitored

# What a reader raises for one file that can't be read; other errors are not about an image.
READ_ERRORS = (
    OSError, EOFError, SyntaxError, TypeError, ValueError, struct.error, tarfile.TarError, zlib.error,
    Image.DecompressionBombError)


@dataclass(eq=False)
class Images(Dataset):
    """The images of a split in one mode, where the next image replaces one that can't be read.

    `replaced` says for each image whether another replaced it since `replaced` was zeroed; workers share it.

    Args:
        reader: The reader of the split.
        source: Its kind.
        mode: Mode of the images.
        transform: Transform of the images, None for none.
        label_map: Map of the labels, None for none.
        num_classes: Classes that labels can have after it, None for any.

    Raises:
        RunError: MAX_SKIPPED images in a row can't be read, or a label is not one of the classes.
    """
    reader: Any
    source: Source
    mode: str
    transform: Callable | None = None
    label_map: Callable[[int], int] | None = None
    num_classes: int | None = None

    def __post_init__(self):
        self.replaced = torch.zeros(len(self), dtype=torch.bool).share_memory_()
        self._num_warnings = 0
        # Of each worker 1 + the index of what it reads, 0 for nothing; workers share it.
        self._reading = torch.zeros(MAX_WORKERS, dtype=torch.int64).share_memory_()

    def __len__(self):
        return len(self.reader)

    def __getitem__(self, index):
        reading, worker = self._reading.numpy(), get_worker_info()  # as an array it takes a tenth of the time
        place = worker.id % MAX_WORKERS if worker else 0
        reading[place] = 1 + index
        item = self._item(index)
        reading[place] = 0
        return item

    def being_read(self) -> str:
        """Return what is being read now, for the message about a missing batch; '' for nothing."""
        return _being_read(self._reading, self._describe)

    def _item(self, index):
        wanted = index
        for _ in range(MAX_SKIPPED):
            try:
                image, target = self._read(index)
                break
            except READ_ERRORS as e:
                cause = _cause(e)
                self._num_warnings += 1
                _warn_skipped(f'sample {self._describe(index)}', cause, self._num_warnings)
                self.replaced[wanted] = True
                failed, index = index, (index + 1) % len(self)
        else:
            raise RunError(
                f'data: Failed to load {MAX_SKIPPED} consecutive samples, the last {self._describe(failed)}: {cause}')
        try:
            label = class_index(target, self.num_classes, self.label_map)
        except ValueError as e:
            raise RunError(f'data: {self._describe(index)} has {e}') from e
        if self.transform is not None:
            image = self.transform(image)
        return image, label

    def _read(self, index):
        """Return an image and its target; raise one of READ_ERRORS where the image is broken, RunError otherwise."""
        image = None
        try:
            image, target = self.reader[index][:2]
            return _to_mode(image if isinstance(image, Image.Image) else Image.open(image), self.mode), target
        except READ_ERRORS:
            raise
        except Exception as e:
            if image is not None and not isinstance(e, MemoryError):
                raise OSError(first_line(e)) from e  # what else Pillow raises for broken files has no common base
            raise RunError(f'data: {self._describe(index)}: {_no_image(e)}') from e

    def name(self, index: int) -> str | None:
        """Return the name of an image's file, None where it has none."""
        try:
            name = self.reader.filename(index)
        except (KeyError, TypeError):
            return None
        return name if name is None else ' '.join(str(name).splitlines())

    def _describe(self, index):
        name = self.name(index)
        return f'index {index}' if name is None else f'{name} (index {index})'


class LoneImages(Images):
    """Images without labels. One that can't be read is blank and marked in `replaced`, not replaced by another."""

    def __getitem__(self, index):
        try:
            image = self._read(index)[0]
        except READ_ERRORS:
            self.replaced[index] = True
            image = Image.new(self.mode, (1, 1))
        return self.transform(image), 0

    def failure(self, index: int) -> str:
        """Return why an image can't be read."""
        try:
            self._read(index)
        except READ_ERRORS as e:
            return _cause(e)
        return 'the first attempt failed, a later one succeeded'


class StreamImages(IterableDataset):
    """The images of a stream, split into one part per worker and process, in order.

    In training a part is shuffled, starts again if it is short, and ends with the last batch; images come with their
    SampleDraw. Attributes are those of `Images`; `replaced` counts by worker what could not be read and was left out.

    Args:
        reader: The reader of the split.
        source: Its kind.

    Raises:
        RunError: As `Images`; or a part is empty.
    """

    def __init__(self, reader, source: Source):
        self.reader, self.source = reader, source
        self.transform = self.label_map = self.num_classes = None
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers persist
        self._num_warnings = 0
        self.distribute(0, Processes(None))

    def __len__(self):
        return self.reader.num_samples or 0

    def distribute(
            self, workers: int, processes: Processes, seed: int = 0, batches: int = 0, batch_size: int = 1,
    ) -> None:
        """Distribute the images over the workers of all processes.

        Args:
            workers: Workers of a process.
            processes: The processes.
            seed: Seed of the order and all draws in training.
            batches: Batches of an epoch of training and process, 0 for a validation.
            batch_size: Images of a batch.

        Raises:
            UsageError: The reader can't do it.
        """
        self.processes, self.seed, self.batches, self.batch_size = processes, seed, batches, batch_size
        # Of each worker, which share it: what could not be read, and 1 + the shard that it reads.
        self.replaced, self._reading = torch.zeros(2, max(1, workers), dtype=torch.int64).share_memory_()
        if self.source.shards is None:
            if processes.distributed and not workers:
                raise UsageError('--workers 0: this kind of --dataset needs a worker where there are several processes')
            self.reader.set_loader_cfg(num_workers=workers)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of training."""
        self.epoch.fill_(epoch)
        self.reader.set_epoch(epoch)  # of a reader that distributes its samples itself

    def __iter__(self) -> Iterator:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        # Torch takes batches from its workers in turn, so that some of them have one more.
        units = self.batches or workers
        least, more = divmod(units, workers)
        first = self.processes.rank * units + worker * least + min(worker, more)
        last = first + least + (worker < more)
        epoch, end = int(self.epoch), (last - first) * self.batch_size if self.batches else None
        if first == last:
            return
        found = self._read(first, last, units * self.processes.world_size, worker)
        for position, (where, image, target) in enumerate(islice(found, end), start=first * self.batch_size):
            try:
                label = class_index(target, self.num_classes, self.label_map)
            except ValueError as e:
                raise RunError(f'data: {where} has {e}') from e
            if self.batches:
                seed_all(self.seed, 'sample', epoch, position)
            if self.transform is not None:
                image = self.transform(image)
            yield (image, label, SampleDraw(epoch, position, 0)) if self.batches else (image, label)

    def _read(self, first, last, whole, worker):
        """Yield the location, image and target of each sample of a part: once, in training repeatedly."""
        shards, failed = self.source.shards, 0  # in a row
        if shards is None:
            # In validation timm makes the shares equal by repeating their last image.
            own = len(range(first, len(self), whole)) if len(self) and not self.batches else None
            for image, target in islice(self.reader, own):
                yield 'a sample of the stream', image, target
            return
        reader = copy.copy(self.reader)  # of this pass alone
        for where, sample in self._samples(shards, reader, first, last, whole, worker):
            try:
                decoded = shards.decode(reader, sample)
                failed = 0
            except (KeyError, MemoryError) as e:
                raise RunError(f'data: {where}: {_no_image(e)}') from e
            except Exception as e:  # what Pillow raises for broken files has no common base
                self._num_warnings, failed = self._num_warnings + 1, failed + 1
                _warn_skipped(where, _cause(e), self._num_warnings)
                self.replaced[worker] += 1
                if failed == MAX_SKIPPED:
                    raise RunError(
                        f'data: Failed to load {MAX_SKIPPED} consecutive samples, the last {where}: {_cause(e)}') from e
                continue
            if decoded is not None:
                yield where, *decoded

    def _samples(self, shards, reader, first, last, whole, worker):
        """Yield the location of each sample and the encoded sample; in training repeatedly."""
        listed, epoch = shards.find(reader), int(self.epoch)
        order = list(range(len(listed)))
        if self.batches:
            order = np.random.default_rng((self.seed, epoch)).permutation(len(listed)).tolist()
        pieces = part_of(first, last, whole, [listed[shard][1] for shard in order])

        def once():
            for piece in pieces:
                shard = order[piece.shard]
                self._reading[worker] = 1 + shard
                for index, sample in enumerate(shards.read(reader, shard)):
                    if piece.holds(index):
                        yield f'sample {index} of {listed[shard][0]}', sample

        if not self.batches:
            yield from once()
            return
        rng, found = random.Random(derive_seed(self.seed, 'shuffle', epoch, first)), True
        while found:
            found = False
            for sample in shuffled(once(), shards.buffer(reader), rng):
                found = True
                yield sample
        raise RunError(f'data: a worker has no images in its part of the {len(listed)} shards; use fewer --workers')

    @staticmethod
    def name(index: int) -> None:
        """Return None: images of a stream have no names."""

    def being_read(self) -> str:
        """Return which shards are being read, for the message about a missing batch."""
        names = self.source.shards and [name for name, _ in self.source.shards.find(self.reader)]
        return _being_read(self._reading, names.__getitem__) if names else ', while a stream is read'


Split = Images | StreamImages


def _being_read(reading: torch.Tensor, describe: Callable[[int], str]) -> str:
    found = [f'worker {worker} reads {describe(index - 1)}' for worker, index in enumerate(reading.tolist()) if index]
    return f', while {", ".join(found[:4])}' if found else ''


def _cause(error: Exception) -> str:
    return 'not an image that Pillow can read' if isinstance(error, UnidentifiedImageError) else first_line(error)


def _no_image(error: Exception) -> str:
    """Return the cause in an error that is not about one broken image."""
    return {
        KeyError: f'{error} is not a column of the data, or not in --class-map',
        MemoryError: 'out of memory (use fewer --workers)',
    }.get(type(error), f'{type(error).__name__} {first_line(error)}')


def _warn_skipped(where: str, cause: str, number: int) -> None:
    """Warn of the first few samples that this process skips."""
    if number <= MAX_WARNINGS:
        last = '; further ones are counted, but not logged' if number == MAX_WARNINGS else ''
        _logger.warning(f'Skipped {where}: {cause}{last}')


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Decode an image in a mode; of 16-bit grey the high byte, where Pillow would make all but the darkest white."""
    if image.mode[0] in 'FI' and mode[0] not in 'FI':
        values = np.asarray(image)
        if image.mode == 'F' or values.min() < 0 or values.max() > 0xffff:
            raise ValueError(f'pixels of mode {image.mode}, which has no known value for white')
        image = Image.fromarray((values >> 8).astype(np.uint8))
    return image.convert(mode)


def class_index(target, num_classes: int | None, transform: Callable[[int], int] | None = None) -> int:
    """Return a label, as the transform has it, if it is a class index; otherwise raise ValueError."""
    try:
        label = int(target)
        if label == target and label >= 0:
            label = label if transform is None else transform(label)
            if num_classes is None or 0 <= label < num_classes:
                return label
    except (IndexError, KeyError, OverflowError, TypeError, ValueError):
        pass
    known = f'not one of the {num_classes} classes, 0 to {num_classes - 1}' if num_classes else 'not a class index'
    raise ValueError(f'the label {target!r}, {known}')
