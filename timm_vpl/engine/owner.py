"""Ownership of a run's folder: one process, which keeps a file there and touches it as long as it lives."""
import contextlib
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path

from ..errors import RunError, UsageError
from ..files import temporary
from ..text import one_line

_logger = logging.getLogger('train')

FILE = 'owner'
BEAT = 5  # seconds between two touches
STALE = 30  # seconds without one after which an owner on another machine counts as dead


class Owner:
    """Makes a folder this process's own, for as long as it lives.

    All of it works on network file systems too: a file is created that must not exist, renamed, and opened again to be
    read. Clocks do not matter: a process of this machine is looked up; for another machine the file is watched for a
    change.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._card = f'{socket.gethostname()} {os.getpid()} {_machine()} {uuid.uuid4().hex}\n'
        self._released = threading.Event()

    def claim(self, folder: str) -> None:
        """Own a folder, if it is there and can be written to.

        Raises:
            UsageError: A process that lives owns it.
        """
        path = Path(folder, FILE)
        if not os.path.isdir(folder) or (self._path is not None and os.path.samefile(folder, self._path.parent)):
            return
        try:
            while self._path is None:
                try:
                    self._write(path)
                    self._path = path
                except FileExistsError:
                    _take_over(path)
        except OSError:  # not writable; the first attempt to write will report it
            return
        threading.Thread(target=self._beat, args=(path,), daemon=True).start()

    def check(self) -> None:
        """Make sure that the folder is still this process's own.

        Raises:
            RunError: Another process has taken it over, after this one seemed dead.
        """
        if self._path is None:
            return
        with contextlib.suppress(FileExistsError):
            self._write(self._path)  # where the folder was removed and made again
        found = self._path.read_text()
        if found != self._card:
            raise RunError(
                f'{self._path.parent}: {_name(found)} trains there now; this process hung too long and gives up the '
                f'folder')

    def release(self) -> None:
        """Let others own the folder."""
        path, self._path = self._path, None
        self._released.set()
        with contextlib.suppress(OSError):
            if path is not None and path.read_text() == self._card:
                path.unlink()

    def _write(self, path: Path) -> None:
        with open(path, 'x') as file:
            file.write(self._card)

    def _beat(self, path: Path) -> None:
        while not self._released.wait(BEAT):
            with contextlib.suppress(OSError):
                if path.read_text() == self._card:
                    os.utime(path)


def _take_over(path: Path) -> None:
    """Remove the file of an owner that is dead.

    Raises:
        UsageError: The owner lives.
    """
    with contextlib.suppress(FileNotFoundError):  # it has gone meanwhile
        seen, beat = path.read_text(), path.stat().st_mtime_ns
        if not _is_dead(seen):
            _logger.warning(
                f'{path.parent}: {_name(seen)} trained there; waiting up to {STALE} s to see whether it is alive')
            begun = time.monotonic()
            while time.monotonic() - begun < STALE:
                time.sleep(BEAT / 5)
                if (path.read_text(), path.stat().st_mtime_ns) != (seen, beat):
                    raise UsageError(f'--output {path.parent}: {_name(seen)} is training there; end it, or use another '
                                     f'--experiment')
        stale = Path(temporary(path))
        path.rename(stale)
        if stale.read_text() != seen:  # another process was quicker, and owns the folder
            with contextlib.suppress(OSError):
                os.link(stale, path)
        stale.unlink()


def _parse(card: str) -> tuple[str, int, str] | None:
    """Return host, process and machine of a card; None if it has another format."""
    try:
        host, process, machine, _ = card.split()
        return host, int(process), machine
    except ValueError:
        return None


def _name(card: str) -> str:
    owner = _parse(card)
    return f'process {owner[1]} on {one_line(owner[0])}' if owner else 'another process'


def _is_dead(card: str) -> bool:
    """Return whether the process of a card is of this machine, and has ended."""
    owner = _parse(card)
    if owner is None or owner[-1] != _machine():
        return False
    try:
        os.kill(owner[1], 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass
    return False


def _machine() -> str:
    """Return a name of this machine since it has started, within one process namespace."""
    try:
        return Path('/proc/sys/kernel/random/boot_id').read_text().strip() + os.readlink('/proc/self/ns/pid')
    except OSError:
        return uuid.uuid4().hex  # unknown
