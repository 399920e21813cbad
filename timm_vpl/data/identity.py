"""What tells the data of a run from others, without reading an image."""
import hashlib
import os
from typing import Any

from .images import Split

IDENTITY_VERSION = 1  # of what is hashed


def data_identity(dataset: Split, class_names: list[str] | None) -> dict[str, Any]:
    """Return what tells the data of a split from others, without reading an image.

    Args:
        dataset: Data set of one split.
        class_names: Its classes in the order of their indices, None where it does not name them.

    Returns:
        `version` of this function, `images`, `classes`, and `files`: a hash of the paths below the split's folder and
        of the labels, in order; of a stream, of the names and sizes of its shards and its revision.
    """
    digest = hashlib.sha256()
    for entry in dataset.source.entries(dataset.reader):
        digest.update(os.fsencode(entry) + b'\n')
    return {
        'version': IDENTITY_VERSION, 'images': len(dataset), 'classes': class_names, 'files': digest.hexdigest()[:32]}


def data_changes(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """Return a line for each field in which two identities of one split differ, by field."""
    lines: dict[str, str] = {}
    for field in ('images', 'classes', 'files') if before.get('version') == now['version'] else ('images', 'classes'):
        then: Any = before.get(field)
        present: Any = now[field]
        if then == present or field == 'classes' and None in (then, present):
            continue
        if field == 'classes':
            index = next((i for i, pair in enumerate(zip(then, present, strict=False)) if pair[0] != pair[1]),
                         min(len(then), len(present)))
            shown = [repr(names[index]) if index < len(names) else 'none' for names in (then, present)]
            lines[field] = f'class {index} was {shown[0]}, now {shown[1]}'
        else:
            lines[field] = f'{then} images before, now {present}' if field == 'images' else 'other images or labels'
    return lines
