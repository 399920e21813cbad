"""Decisions of the processes of a run between two updates: to continue, to save, to stop, to give up."""
import contextlib
import faulthandler
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from ..errors import Stopped
from . import peers

_logger = logging.getLogger('train')

# Decisions, the larger one wins; from STOP on: STOP + the signal's number.
GO_ON, SAVE, STOP, GIVE_UP = 0, 1, 100, 1000

SIGNALS = [getattr(signal, name) for name in ('SIGTERM', 'SIGINT', 'SIGUSR1') if hasattr(signal, name)]
_ECHO_SECONDS = 1  # within which a signal is the same one again: Ctrl-C comes from the terminal and from torchrun
_PATIENCE = 10  # seconds after a signal in which an awaited batch may still come, if there are other processes
_LATE = 15  # seconds in which all must have stalled; torchrun and SLURM kill after 30
_STALL = 60  # seconds of waiting for a batch before a warning


class Stalled(BaseException):
    """A run that should stop is stalled: the batch that it awaits does not come. The message names what is read."""


class Control:
    """Collects the requests of all processes and returns one decision to each, without making them wait for each other.

    The requests of an update are sent in a separate group (gloo, on the host) while the next update is computed; the
    decision that `decide` returns is that of the update before, the same in all processes.

    As a context it takes the signals SIGTERM, SIGINT and SIGUSR1 as requests to stop (the same one again, or SIGINT,
    ends the process at once), and prints the stacks of all threads and ends the process when nothing was decided for
    `hang_timeout`.

    Args:
        distributed: Whether there are other processes.
        hang_timeout: Seconds, 0 for no limit.
        recovery_minutes: Minutes between two requests of this process to save, 0 for none.
        give_up: Ends the run if a signal came, a batch is awaited, and not all processes stall in time.
    """

    def __init__(
            self,
            distributed: bool = False,
            hang_timeout: float = 0,
            recovery_minutes: float = 0,
            give_up: Callable[[int, str], None] = lambda number, reads: None,
    ):
        self.hang_timeout = hang_timeout
        self.recovery_minutes = recovery_minutes
        self.waited = 0.  # seconds that batches were awaited
        self._give_up = give_up
        self._patience = _PATIENCE if distributed else 0
        self._group: Any = dist.new_group(backend='gloo') if distributed else None
        self._pending: tuple | None = None  # (work, tensor) of the requests under way
        self._signal: tuple[int, float] | None = None  # (number, time) of the first one that any process got
        self._own_signal: tuple[int, float] | None = None  # likewise, this process
        self._awaits: float | None = None  # since when a batch is awaited, and then that all have stalled
        self._reads: Callable[[], str] = str  # what is read for it
        self._stalled = self._warned = False
        self._saved = time.monotonic()
        self._watched = -float('inf')
        self._handlers: dict = {}
        self._wakeup: tuple[int, socket.socket] | None = None

    def __enter__(self):
        with contextlib.suppress(ValueError):  # only the main thread may
            for number in SIGNALS:
                self._handlers[number] = signal.signal(number, lambda number, frame: None)
            if hasattr(signal, 'SIGALRM'):
                self._handlers[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._interrupt)
            # Python runs handlers between two of its own instructions, which a process that waits in a collective does
            # not reach. This thread gets a signal even then.
            receiver, sender = socket.socketpair()
            sender.setblocking(False)
            receiver.settimeout(0.5)  # seconds between two checks of the awaited batch
            self._wakeup = (signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False), sender)
            threading.Thread(target=self._listen, args=(receiver,), daemon=True).start()
            if others := peers.current():
                others.on_signal = self._note_signal
        self.watch()
        return self

    def __exit__(self, kind, *error):
        if self._wakeup is not None:
            before, sender = self._wakeup
            signal.set_wakeup_fd(before)
            sender.close()  # ends the thread, once the loaders' workers have ended
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self.hang_timeout:
            faulthandler.cancel_dump_traceback_later()
        if kind is None or issubclass(kind, Stopped):  # in all processes
            self._decided()

    def _listen(self, receiver):
        with receiver, contextlib.suppress(ConnectionError):
            while True:
                with contextlib.suppress(TimeoutError):
                    data = receiver.recv(1)
                    if not data:
                        return
                    if data[0] in SIGNALS:
                        self._take_signal(data[0], time.monotonic())
                self._check_batch(time.monotonic())

    def _take_signal(self, number: int, now: float) -> None:
        """Handle a signal that this process got."""
        if self._own_signal is None:
            self._own_signal = (number, now)
            self._note_signal(number)
            if others := peers.current():
                others.announce(peers.SIGNAL, number)
        elif now - self._own_signal[1] > _ECHO_SECONDS and number in (self._own_signal[0], signal.SIGINT):
            os._exit(128 + number)

    def _note_signal(self, number: int) -> None:
        """Note a signal that any process got."""
        self._signal = self._signal or (number, time.monotonic())

    def _check_batch(self, now: float) -> None:
        """Check whether the awaited batch is late."""
        awaits = self._awaits
        if awaits is None:
            return
        if self._signal is not None:
            number, begun = self._signal
            waited = now - max(begun, awaits)
            if waited > _LATE:
                self._give_up(number, self._reads())
            elif waited >= self._patience and not self._stalled and hasattr(signal, 'pthread_kill'):
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)
        elif now - awaits > min(_STALL, self.hang_timeout / 2 or _STALL) and not self._warned:
            self._warned = True
            _logger.warning(f'No batch for {now - awaits:.0f} s{self._reads()}')

    def _interrupt(self, number, frame) -> None:
        if self._awaits is not None and not self._stalled:
            self._stalled = True
            raise Stalled(self._reads())

    def awaited(self, batches: Iterable, reads: Callable[[], str] = str) -> Iterator:
        """Yield batches.

        Args:
            batches: The batches.
            reads: Returns what is read for the next one.

        Raises:
            Stalled: A signal came, and the next batch does not.
        """
        batches = iter(batches)
        while True:
            self._reads, self._awaits = reads, time.monotonic()
            batch = next(batches, None)
            self.waited += time.monotonic() - self._awaits
            self._awaits, self._warned = None, False
            if batch is None:
                return
            yield batch

    def saved(self) -> None:
        """Restart the minutes until the next request to save."""
        self._saved = time.monotonic()

    def decide(self, request: int = GO_ON) -> int:
        """Return what the processes decided: GO_ON, SAVE, GIVE_UP or STOP + signal.

        All processes call it equally often.

        Args:
            request: The request of this process.
        """
        self.watch()
        if self.recovery_minutes and time.monotonic() - self._saved >= 60 * self.recovery_minutes:
            request = max(request, SAVE)
            self.saved()  # the request is on its way
        if self._signal is not None:
            request = max(request, STOP + self._signal[0])
        if self._group is None:
            return request
        decided = self._decided()
        requests = torch.tensor([request])
        self._pending = (dist.all_reduce(requests, dist.ReduceOp.MAX, self._group, async_op=True), requests)
        return decided

    def decide_here(self) -> int:
        """Return the decision once all processes have stalled, with the requests made here.

        It replaces the `decide` of the next update: a process that has begun that update never comes to it.
        """
        decided = max(self.decide(), self._decided())
        self._awaits = None
        return decided

    def _decided(self) -> int:
        if self._pending is None:
            return GO_ON
        (work, requests), self._pending = self._pending, None
        work.wait()
        return int(requests)

    def watch(self) -> None:
        """Restart the hang timeout."""
        now = time.monotonic()
        if self.hang_timeout and sys.__stderr__ is not None and now - self._watched > min(1, self.hang_timeout / 4):
            faulthandler.dump_traceback_later(self.hang_timeout, exit=True, file=sys.__stderr__)
            self._watched = now
