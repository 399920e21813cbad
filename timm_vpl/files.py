"""Atomic writes of files: written under another name, flushed to disk, renamed."""
import contextlib
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path

from .errors import RunError


def temporary(path: str | Path) -> str:
    """Return a temporary name for a file that is unique among processes and machines."""
    return f'{path}.{uuid.uuid4().hex}.tmp'


def is_temporary(name: str) -> bool:
    """Return whether a file's name is one of `temporary`."""
    return re.fullmatch(r'.*\.[0-9a-f]{32}\.tmp', name, re.DOTALL) is not None


@contextlib.contextmanager
def replacing(path: str, mode: str = 'w', **kwargs) -> Iterator:
    """Open a file that replaces `path` once it is completely on disk; after an error the old one stays.

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
    """As `replacing`, but raise RunError with the path if the file can't be written."""
    try:
        with replacing(str(path), mode, **kwargs) as file:
            yield file
    except OSError as e:
        raise RunError(f'{path}: cannot be written: {e.strerror or e}') from e


def replace(src: str | Path, dst: str | Path) -> None:
    """Rename a file over another, so that one of the two survives a power failure."""
    os.replace(src, dst)
    with contextlib.suppress(OSError):  # not every system can open a folder
        folder = os.open(os.path.dirname(dst) or '.', os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
