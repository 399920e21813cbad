"""Folders of images: where a split is, what is in it, and which classes its folders are."""
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from timm.data.readers.img_extensions import get_img_extensions
from timm.utils.misc import natural_key

from ..bars import bar
from ..compat import search_split
from ..errors import UsageError
from ..text import one_line

_logger = logging.getLogger(__name__)

# What is not read in a folder, besides files by their ending.
HIDDEN = 'hidden (a name that begins with a dot)'
LOOSE = 'outside the class folders'
SPECIAL = 'pipes or devices'


def find_split(data_dir: str, split: str, flag: str, whole: bool, endings: str | None) -> tuple:
    """Return the folder or tar of a split, and for a folder its images by folder and what is not read.

    Args:
        data_dir: Folder of the splits.
        split: Name of the split.
        flag: Option that names it.
        whole: Take a folder of class folders, or a tar, for the split itself.
        endings: Those of images, with `;` between them; by default timm's.

    Raises:
        UsageError: The split has no folder or tar of its own, or can't be read.
    """
    root = search_split(data_dir, split) if os.path.isdir(data_dir) else data_dir
    own = Path(root) != Path(data_dir)
    images = not_read = None
    if os.path.isdir(root) and (own or whole):
        images, not_read = scan_folder(
            root, set(endings.lower().split(';')) if endings else get_img_extensions(as_set=True))
        not_read[LOOSE] += len(images.pop('.'))
        not_read = +not_read
    if own or whole and not any(os.sep in folder for folder in images or ()):
        return root, images, not_read
    # timm falls back to all images, and would train and validate on the same ones.
    if os.path.isfile(root):
        raise UsageError(
            f'--data-dir {root}: one tar for all splits; give its folder, and each split its own tar '
            f'({flag} {os.path.basename(root)})')
    entries = ', '.join(sorted(e.name for e in Path(root).iterdir() if e.is_dir() or e.suffix == '.tar')[:8])
    raise UsageError(f'{flag} {split}: no such folder or tar in {root}, which has {entries or "none"}')


def scan_folder(root: str, types: set[str], flag: str = '--data-dir') -> tuple[dict[str, list[str]], Counter[str]]:
    """Return the paths of the images of each folder in a folder, and how many files are not read, by reason.

    Args:
        root: The folder; it is '.' itself.
        types: Endings of images.
        flag: Option or argument that names it.

    Raises:
        UsageError: A folder can't be read, or contains itself by a link, which timm would read 40 times.
    """
    images: dict[str, list[str]] = {}
    not_read: Counter[str] = Counter()
    pending: list[tuple[str, tuple]] = [(root, ())]
    try:
        with bar(f'Reading {one_line(root, 60)}', 'images', delay=1.) as shown:
            while pending:
                folder, above = pending.pop()
                status = os.stat(folder)
                here = (status.st_dev, status.st_ino)
                if here in above:
                    raise UsageError(f'{flag}: {folder} is a link to a folder that contains it; remove it')
                paths = images[os.path.relpath(folder, root)] = []
                with os.scandir(folder) as entries:
                    for entry in entries:
                        name = entry.name
                        if name[0] == '.':
                            not_read[HIDDEN] += 1
                        elif (kind := _kind(entry)) == 'folder':
                            pending.append((entry.path, (*above, here)))
                        elif (extension := os.path.splitext(name)[1].lower()) not in types:
                            not_read[extension or 'without an ending'] += 1
                        elif kind == SPECIAL:  # reading it would hang
                            not_read[SPECIAL] += 1
                        else:
                            paths.append(entry.path)
                shown.update(len(paths))
    except OSError as e:
        raise UsageError(f'{flag}: {e.filename} cannot be read ({e.strerror})') from e
    return images, not_read


def find_images(path: str, flag: str) -> list[str]:
    """Return the paths of all images below a folder, in natural order; of a file, its own.

    Args:
        path: The folder, or the file, whatever its ending.
        flag: Argument that names it.

    Raises:
        UsageError: The folder contains no images, or can't be read.
    """
    if not os.path.isdir(path):
        return [path]
    images, not_read = scan_folder(path, get_img_extensions(as_set=True), flag)
    found = sorted((each for paths in images.values() for each in paths), key=lambda path: (natural_key(path), path))
    if not found:
        raise UsageError(f'{flag} {path}: contains no images; not read: {dict(not_read)}')
    return found


def _kind(entry: os.DirEntry) -> str:
    """Return 'folder', 'file' or SPECIAL; a link to nothing, or to itself, is a file that can't be read."""
    try:
        if entry.is_dir():
            return 'folder'
        return 'file' if entry.is_file() or not os.path.exists(entry.path) else SPECIAL
    except OSError:  # a link to itself
        return 'file'


def check_folders(root: str, images: dict[str, list[str]], not_read: dict[str, int], allow_empty: bool) -> None:
    """Raise UsageError where a folder that was scanned has no image, or one of its class folders has none."""
    filled = {folder.split(os.sep)[0] for folder, paths in images.items() if paths}
    if not filled:
        raise UsageError(f'--data-dir: no images in the folders of {root}; not read: {dict(not_read)}')
    empty = sorted(folder for folder in images if os.sep not in folder and folder not in filled)
    if empty and not allow_empty:
        raise UsageError(
            f'--data-dir: class folder {os.path.join(root, empty[0])} contains no images; remove it from every split '
            f'or fill it')


def number_classes(
        folders: Iterable[str],
        root: str,
        class_map: dict[Any, int] | None = None,
        file: str = '',
) -> dict[Any, int]:
    """Return the index of each class, the name of a folder with images: as timm's, but in a total order.

    Args:
        folders: The folders with images, as paths in the root.
        root: Folder or tar of the data, for messages.
        class_map: The given indices.
        file: Their file.

    Raises:
        UsageError: The class map misses folders, or the folders are not one class each.
    """
    folders = set(folders)
    if class_map is not None:
        missing = sorted(folder for folder in folders if os.path.basename(folder) not in class_map)
        if missing:
            raise UsageError(
                f'--class-map {file}: misses {len(missing)} of the {len(folders)} folders with images in {root} '
                f'({", ".join(missing[:5])}); name them too, or remove them')
        return class_map
    paths = defaultdict(list)
    for folder in sorted(folders):
        paths[os.path.basename(folder)].append(folder)
        above = next((str(path) for path in Path(folder).parents if str(path) in folders), None)
        if above:
            raise UsageError(
                f'--data-dir: {root}: the folder {folder} would be a class besides {above}, which contains it; move '
                f'its images, or name both in a --class-map')
    several = [f'{name} in {", ".join(each[:3])}' for name, each in paths.items() if len(each) > 1]
    if several and len(paths) == 1:
        raise UsageError(
            f'--data-dir: {root}: its {len(folders)} folders with images share one name, so that all would be one '
            f'class: {several[0]}; move the images up')
    if several:
        _logger.warning(one_line(
            f'{root}: {len(several)} classes combine several folders of one name: {"; ".join(several[:3])}'))
    return {name: index for index, name in enumerate(sorted(paths, key=lambda name: (natural_key(name), name)))}
