"""What tells the data of a run from others, without reading an image."""
import hashlib
import os
from collections.abc import Iterator
from typing import Any

from torch.utils.data import Dataset, IterableDataset

IDENTITY_VERSION = 1  # of what is hashed


def data_identity(dataset: Dataset, class_names: list[str] | None) -> dict[str, Any]:
    """Return what tells the data of a split from others, without reading an image.

    Args:
        dataset: Data set of one split.
        class_names: Its classes in the order of their indices, None where it does not name them.

    Returns:
        `version` of this function, `images`, `classes`, and `files`: a hash of the paths below the split's folder and
        of the labels, in order; of a stream, of the names and sizes of its shards and its revision.
    """
    digest = hashlib.sha256()
    for entry in _stream_entries(dataset) if isinstance(dataset, IterableDataset) else _entries(dataset):
        digest.update(os.fsencode(entry) + b'\n')
    return {
        'version': IDENTITY_VERSION, 'images': len(dataset), 'classes': class_names, 'files': digest.hexdigest()[:32]}


def _entries(dataset) -> Iterator[str]:
    """Yield a line an image; of data without file names its labels, or the names of the files that were downloaded."""
    source = getattr(dataset, 'reader', None) or dataset
    samples, info = getattr(source, 'samples', None), getattr(getattr(source, 'dataset', None), 'info', None)
    if info is not None:  # Hugging Face
        yield from (f'{info.version}', *sorted(info.download_checksums or ()))
    elif isinstance(samples, list) and samples and isinstance(samples[0][0], (str, os.PathLike)):  # folders
        start = len(os.path.join(source.root, ''))
        for path, label in samples:
            yield f'{str(path)[start:]}\0{label}'
    elif callable(getattr(source, 'filename', None)):  # timm's readers of tars and of the digits
        labels = getattr(source, 'targets', None)
        for index in range(len(source)):
            yield f'{source.filename(index)}\0{"" if labels is None else labels[index]}'
    else:  # torchvision
        yield from map(str, getattr(source, 'targets', None) or getattr(source, '_labels', None) or ())


def _stream_entries(dataset) -> Iterator[str]:
    reader = dataset.reader
    builder = getattr(reader, 'builder', None)  # of tfds and hfids
    yield f'{getattr(builder, "hash", "")} {getattr(getattr(builder, "info", None), "full_name", "")}'
    for name in getattr(getattr(reader, 'split_info', None), 'filenames', None) or ():
        path = os.path.join(str(reader.root or ''), str(name))
        yield f'{os.path.basename(path)}\0{os.path.getsize(path) if os.path.isfile(path) else ""}'


def data_changes(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """Return a line for each field in which two identities of one split differ, by field."""
    lines = {}
    for field in ('images', 'classes', 'files') if before.get('version') == now['version'] else ('images', 'classes'):
        then, present = before.get(field), now[field]
        if field == 'classes' and then != present and None not in (then, present):
            index = next((i for i, pair in enumerate(zip(then, present, strict=False)) if pair[0] != pair[1]),
                         min(len(then), len(present)))
            shown = [repr(names[index]) if index < len(names) else 'none' for names in (then, present)]
            lines[field] = f'class {index} was {shown[0]}, now {shown[1]}'
        elif field != 'classes' and then != present:
            lines[field] = f'{then} images before, now {present}' if field == 'images' else 'other images or labels'
    return lines
