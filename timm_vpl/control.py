"""What the processes of a run decide together between two updates: to go on, to save, to stop, to give up."""
import contextlib
import faulthandler
import signal
import sys
import time

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

    As a context it takes the signals SIGTERM, SIGINT and SIGUSR1 as the wish to stop (a second one ends the process at
    once), and prints the stacks of all threads and ends the process when nothing was decided for `hang_timeout`.

    Args:
        distributed: Whether there are other processes.
        hang_timeout: Seconds, 0 for no limit.
        recovery_minutes: Minutes between two wishes to save, 0 for none.
    """

    def __init__(self, distributed: bool = False, hang_timeout: float = 0, recovery_minutes: float = 0):
        self.hang_timeout = hang_timeout
        self.recovery_minutes = recovery_minutes
        self._group = dist.new_group(backend='gloo') if distributed else None
        self._pending = None  # (work, tensor) of the wishes under way
        self._signal = None  # (number, time) of the first one
        self._saved = time.monotonic()
        self._watched = -float('inf')
        self._handlers = {}

    def __enter__(self):
        for number in SIGNALS:
            with contextlib.suppress(ValueError):  # only the main thread may
                self._handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *error):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self.hang_timeout:
            faulthandler.cancel_dump_traceback_later()
        if self._pending is not None and error[0] is None:
            self._pending[0].wait()

    def _on_signal(self, number, frame):
        now = time.monotonic()
        if self._signal is None:
            self._signal = (number, now)
        elif now - self._signal[1] > _ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

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
        if self.hang_timeout and now - self._watched > min(1, self.hang_timeout / 4):
            faulthandler.dump_traceback_later(self.hang_timeout, exit=True, file=sys.__stderr__)
            self._watched = now


def stop_line(decision: int, where: str) -> Stopped:
    """Return the exception for a decision to stop."""
    number = decision - STOP
    return Stopped(f'stopped by {signal.Signals(number).name} {where}', number)
