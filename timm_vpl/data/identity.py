"""The identity of the data of a run, without reading an image."""
import hashlib
import os
from itertools import zip_longest
from typing import Any

from .images import Split

IDENTITY_VERSION = 1  # of the hashed content


def data_identity(dataset: Split, class_names: list[str] | None) -> dict[str, Any]:
    """Return the identity of the data of a split, without reading an image.

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
    if before.get('images') != now['images']:
        lines['images'] = f'{before.get("images")} images before, now {now["images"]}'
    then, names = before.get('classes') or [], now['classes'] or []
    if then and names and then != names:
        index, pair = next(each for each in enumerate(zip_longest(then, names)) if each[1][0] != each[1][1])
        was, is_now = ('none' if name is None else repr(name) for name in pair)
        lines['classes'] = f'class {index} was {was}, now {is_now}'
    if before.get('version') == now['version'] and before.get('files') != now['files']:
        lines['files'] = 'other images or labels'
    return lines
