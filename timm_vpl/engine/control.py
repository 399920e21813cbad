"""What the processes of a run decide together between two updates: to go on, to save, to stop, to give up."""
import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from typing import Any

import torch
import torch.distributed as dist

# Decisions, the larger one wins; from STOP on: STOP + the signal's number.
GO_ON, SAVE, STOP, GIVE_UP = 0, 1, 100, 1000

SIGNALS = [getattr(signal, name) for name in ('SIGTERM', 'SIGINT', 'SIGUSR1') if hasattr(signal, name)]
_ECHO_SECONDS = 1  # within which a signal is the same one again: Ctrl-C comes from the terminal and from torchrun


class Stopped(Exception):
    """A run that ends early because it was told to; the message is one line."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_status = 128 + signal_number


class Control:
    """Collects what each process wishes and gives all of them one decision, without making them wait for each other.

    The wishes of an update travel in a group of their own (gloo, on the host) while the next update is computed; the
    decision that `decide` returns is that of the update before, the same in all processes.

    As a context it takes the signals SIGTERM, SIGINT and SIGUSR1 as the wish to stop (the same one again, or SIGINT,
    ends the process at once), and prints the stacks of all threads and ends the process when nothing was decided for
    `hang_timeout`.

    Args:
        distributed: Whether there are other processes.
        hang_timeout: Seconds, 0 for no limit.
        recovery_minutes: Minutes between two wishes of this process to save, 0 for none.
    """

    def __init__(self, distributed: bool = False, hang_timeout: float = 0, recovery_minutes: float = 0):
        self.hang_timeout = hang_timeout
        self.recovery_minutes = recovery_minutes
        self._group: Any = dist.new_group(backend='gloo') if distributed else None
        self._pending: tuple | None = None  # (work, tensor) of the wishes under way
        self._signal: tuple[int, float] | None = None  # (number, time) of the first one
        self._saved = time.monotonic()
        self._watched = -float('inf')
        self._handlers: dict = {}
        self._wakeup: tuple[int, int] | None = None

    def __enter__(self):
        with contextlib.suppress(ValueError):  # only the main thread may
            for number in SIGNALS:
                self._handlers[number] = signal.signal(number, lambda number, frame: None)
            # Python runs handlers between two steps of its own: a process that waits in a collective has none. This
            # thread hears of a signal all the same.
            heard, speaks = os.pipe()
            if hasattr(os, 'set_blocking'):
                os.set_blocking(speaks, False)
            self._wakeup = (signal.set_wakeup_fd(speaks, warn_on_full_buffer=False), speaks)
            threading.Thread(target=self._listen, args=(heard,), daemon=True).start()
        self.watch()
        return self

    def __exit__(self, *error):
        if self._wakeup is not None:
            before, speaks = self._wakeup
            signal.set_wakeup_fd(before)
            os.close(speaks)  # ends the thread, once the loaders' workers have ended
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self.hang_timeout:
            faulthandler.cancel_dump_traceback_later()
        if self._pending is not None and error[0] is None:
            self._pending[0].wait()

    def _listen(self, heard):
        while data := os.read(heard, 1):
            number, now = data[0], time.monotonic()
            if number not in SIGNALS:
                continue
            if self._signal is None:
                self._signal = (number, now)
            elif now - self._signal[1] > _ECHO_SECONDS and number in (self._signal[0], signal.SIGINT):
                os._exit(128 + number)
        os.close(heard)

    def saved(self) -> None:
        """Start the minutes to the next wish to save."""
        self._saved = time.monotonic()

    def decide(self, wish: int = GO_ON) -> int:
        """Return what the processes decided: GO_ON, SAVE, GIVE_UP or STOP + signal.

        All processes call it equally often.

        Args:
            wish: What this process wishes.
        """
        self.watch()
        if self.recovery_minutes and time.monotonic() - self._saved >= 60 * self.recovery_minutes:
            wish = max(wish, SAVE)
            self.saved()  # it is on its way
        if self._signal is not None:
            wish = max(wish, STOP + self._signal[0])
        if self._group is None:
            return wish
        decided = GO_ON
        if self._pending is not None:
            work, wishes = self._pending
            work.wait()
            decided = int(wishes)
        wishes = torch.tensor([wish])
        self._pending = (dist.all_reduce(wishes, dist.ReduceOp.MAX, self._group, async_op=True), wishes)
        return decided

    def watch(self) -> None:
        """Say that this process is alive."""
        now = time.monotonic()
        if self.hang_timeout and sys.__stderr__ is not None and now - self._watched > min(1, self.hang_timeout / 4):
            faulthandler.dump_traceback_later(self.hang_timeout, exit=True, file=sys.__stderr__)
            self._watched = now
