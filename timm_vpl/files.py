"""Files that are whole or as they were: written under another name, flushed to disk, renamed."""
import contextlib
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path

from .errors import RunError


def temporary(path: str | Path) -> str:
    """Return a name beside a file's that no other process takes, on whatever machine."""
    return f'{path}.{uuid.uuid4().hex}.tmp'


def is_temporary(name: str) -> bool:
    """Return whether a file's name is one of `temporary`."""
    return re.fullmatch(r'.*\.[0-9a-f]{32}\.tmp', name, re.DOTALL) is not None


@contextlib.contextmanager
def replacing(path: str, mode: str = 'w', **kwargs) -> Iterator:
    """Open a file that takes the place of `path` once all of it is on disk; after an error the old one stays.

    Args:
        path: File to write; its folder is made if it is gone.
        mode: As that of open().
        **kwargs: Further arguments of open().
    """
    folder = os.path.dirname(path) or '.'
    os.makedirs(folder, exist_ok=True)
    written = Path(temporary(path))
    try:
        with open(written, mode, **kwargs) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        replace(written, path)
    finally:
        written.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: str | Path, mode: str = 'w', **kwargs) -> Iterator:
    """Do as `replacing`; raise RunError, a line with the path, where the file can't be written."""
    try:
        with replacing(str(path), mode, **kwargs) as file:
            yield file
    except OSError as e:
        raise RunError(f'{path}: can not be written: {e.strerror or e}') from e


def replace(src: str | Path, dst: str | Path) -> None:
    """Rename a file over another, so that a loss of power leaves one of the two."""
    os.replace(src, dst)
    with contextlib.suppress(OSError):  # not every system lets a folder be opened
        folder = os.open(os.path.dirname(dst) or '.', os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
