"""How the processes of a command end together: they exchange failures and signals over torch's store.

No collective is used. After a failure the processes would wait for each other in it; under NCCL so does
`destroy_process_group`.
"""
import contextlib
import json
import math
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ..core.processes import launched
from ..errors import RunError, Stopped, first_line

LOST = 'another process ended or cannot be reached, see the lines before this one, of the other machines too'

# Keys of the store: the first signal, the first failure, how many have done their work, how many are ending.
SIGNAL, END, DONE, ENDING = (f'timm_vpl/{name}' for name in ('signal', 'end', 'done', 'ending'))
POLL_SECONDS = 0.5  # seconds between two checks of the store
JOIN_SECONDS = 1800  # that the other processes have to start, as torch gives them
LINGER, JOINING = 5, 120  # seconds that the others have to notice a failure; more for those that are still starting


class Peers:
    """Exchanges messages with the other processes in a thread, from before they join until all have done their work."""

    def __init__(self) -> None:
        _, self.rank, self.world_size, local_rank = launched()
        self.machine = self.rank - local_rank  # by its first process
        self.joined = False
        self.on_signal: Callable[[int], None] | None = None  # called with the first signal that a process announces
        self._store: Any = None
        self._shown = threading.Lock()  # taken once it is decided who shows the failure
        self._connected, self.ending, self._left = (threading.Event() for _ in range(3))
        self.thread = threading.Thread(target=self._listen, daemon=True)
        self.thread.start()

    def announce(self, key: str, what: Any) -> None:
        """Announce something to all processes, this one included; only the first announcement counts."""
        def send():
            self._connected.wait()
            with contextlib.suppress(RuntimeError):
                self._store.compare_set(key, '', json.dumps(what))
        threading.Thread(target=send, daemon=True).start()  # the network may hang

    def leave(self) -> None:
        """Wait until all have done their work, end the groups, and leave with the others.

        A process that leaves early breaks connections that the others may be using, and the first process takes the
        store with it.
        """
        self._meet(DONE, math.inf if self.rank else 60)  # the first one may have an export to make
        self._left.set()
        self.thread.join()
        dist.destroy_process_group()
        self._meet(ENDING, 10)

    def _listen(self) -> None:
        try:
            # Where torchrun does not serve the store, the first process does; init_process_group shares it.
            serves = self.rank == 0 and os.environ.get('TORCHELASTIC_USE_AGENT_STORE') != 'True'
            self._store = dist.TCPStore(
                os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']), is_master=serves,
                timeout=timedelta(seconds=JOIN_SECONDS), wait_for_workers=False, multi_tenant=True)
            self._connected.set()
            while not self._left.wait(POLL_SECONDS):
                if self.on_signal is not None and self._store.check([SIGNAL]):
                    self.on_signal(json.loads(self._store.get(SIGNAL)))
                    self.on_signal = None
                if self._store.check([END]):
                    self._end(**json.loads(self._store.get(END)))
        except (LookupError, RuntimeError, ValueError) as e:
            if self.joined:  # else the main thread notices by itself
                self.show(f'timm-vpl: error: {LOST} ({first_line(e)})')
                end(RunError.exit_status)

    def _end(self, line: str, status: int, seconds: float, rank: int, machine: int) -> None:
        if rank == self.rank or (self.machine == self.rank and self.machine != machine):
            self.show(line)
        self._shown.acquire(blocking=False)
        self.ending.set()
        with contextlib.suppress(RuntimeError):
            self._meet(ENDING, seconds)
        end(status)

    def show(self, line: str) -> None:
        """Show a failure, unless one is shown already or another process shows it."""
        if self._shown.acquire(blocking=False):
            print(line, file=sys.stderr, flush=True)

    def _meet(self, key: str, seconds: float) -> None:
        """Wait until all processes have reached this point."""
        deadline = time.monotonic() + seconds
        ready = self._store.add(key, 1)
        while ready < self.world_size and time.monotonic() < deadline:
            time.sleep(0.1)
            ready = self._store.add(key, 0)
        time.sleep(0.3)


_peers: Peers | None = None


def current() -> Peers | None:
    """Return the connection to the other processes, if there is one."""
    return _peers


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Connect to the other processes, if there are any; leave with them when all are done, or stopped by a signal.

    After an error there is no waiting: `fail` informs the others.
    """
    global _peers
    _peers, stop = Peers() if launched().world_size > 1 else None, None
    try:
        yield
    except Stopped as e:
        stop = e
    if _peers is not None:
        _peers.leave()
        _peers = None
    if stop is not None:
        raise stop


def fail(line: str, status: int) -> int:
    """Show why a command ends, and end all its processes; where there are no others return the status.

    Args:
        line: The line.
        status: Exit status.
    """
    if launched().world_size == 1 or 'MASTER_ADDR' not in os.environ:
        print(line, file=sys.stderr)
    else:
        peers = _peers or Peers()
        line = f'{line} (process {peers.rank} on {socket.gethostname()})'
        seconds = LINGER if peers.joined else JOINING
        peers.announce(END, {
            'line': line, 'status': status, 'seconds': seconds, 'rank': peers.rank, 'machine': peers.machine})
        peers.ending.wait(3)
        peers.show(line)  # unless the store has decided it
        peers.thread.join(seconds + 2)
        end(status)
    return status


def end(status: int) -> None:
    """End this process at once, with its loaders' workers: its exit handlers would wait for other processes."""
    for child in multiprocessing.active_children():
        child.kill()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)
