"""Images and labels: what stands in for an image that can't be read, and which labels are refused."""
import logging
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import IterableImageDataset
from torch.utils.data import Dataset

from ..errors import RunError, first_line
from .sources import Source

_logger = logging.getLogger(__name__)
_logger.setLevel(logging.WARNING)  # on every process: each reads files that the others do not

MAX_SKIPPED = 10  # unreadable images in a row, after which a run ends
MAX_WARNINGS = 10  # of unreadable images, by each process that reads

# What a reader raises for one file that can't be read; other errors are not of an image.
READ_ERRORS = (
    OSError, EOFError, SyntaxError, TypeError, ValueError, struct.error, tarfile.TarError, zlib.error,
    Image.DecompressionBombError)


@dataclass(eq=False)
class Images(Dataset):
    """The images of a split in one mode, where the next image stands in for one that can't be read.

    `replaced` tells for each image whether another stood in for it since `replaced` was zeroed; workers share it.

    Args:
        reader: The reader of the split.
        source: Its kind.
        mode: Mode of the images.
        transform: Transform of the images, None for none.
        label_map: Map of the labels, None for none.
        num_classes: Classes that labels can have after it, None for any.

    Raises:
        RunError: MAX_SKIPPED images in a row can't be read, or a label is none of the classes.
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

    def __len__(self):
        return len(self.reader)

    def __getitem__(self, index):
        wanted = index
        for _ in range(MAX_SKIPPED):
            try:
                image, target = self._read(index)
                break
            except READ_ERRORS as e:
                cause = _cause(e)
                if self._num_warnings < MAX_WARNINGS:
                    self._num_warnings += 1
                    last = '; further ones are only counted' if self._num_warnings == MAX_WARNINGS else ''
                    _logger.warning(f'Skipped sample {self._describe(index)}: {cause}{last}')
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
            cause = {
                KeyError: f'no {e} among the columns of the data, or in --class-map',
                MemoryError: 'the memory ran out (fewer --workers need less)',
            }.get(type(e), f'{type(e).__name__} {first_line(e)}')
            raise RunError(f'data: {self._describe(index)}: {cause}') from e

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
    """Images without labels, for none of which another stands in: one that can't be read is blank, and `replaced`."""

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
        return 'it could be read only later'


class StreamImages(IterableImageDataset):
    """timm's data set of a stream, whose labels are checked.

    Attributes are those of `Images`.

    Raises:
        RunError: A label is none of the classes.
    """
    label_map = num_classes = None
    replaced = torch.zeros(0, dtype=torch.bool)

    def __init__(self, reader, source: Source):
        super().__init__(None, reader=reader)
        self.source = source

    def __iter__(self) -> Iterator:
        for image, target in super().__iter__():
            try:
                label = class_index(target, self.num_classes, self.label_map)
            except ValueError as e:
                raise RunError(f'data: a sample of the stream has {e}') from e
            yield image, label

    @staticmethod
    def name(index: int) -> None:
        """Return None: images of a stream have no names."""


Split = Images | StreamImages


def _cause(error: Exception) -> str:
    return 'no image that Pillow knows' if isinstance(error, UnidentifiedImageError) else first_line(error)


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Decode an image in a mode; of 16-bit grey the high byte, where Pillow would make all but the darkest white."""
    if image.mode[0] in 'FI' and mode[0] not in 'FI':
        values = np.asarray(image)
        if image.mode == 'F' or values.min() < 0 or values.max() > 0xffff:
            raise ValueError(f'pixels of mode {image.mode}, whose white is not known')
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
    classes = 'no class index' if num_classes is None else f'none of the {num_classes} classes, 0 to {num_classes - 1}'
    raise ValueError(f'the label {target!r}, {classes}')
