"""What loaders raise, in one line."""
import contextlib
import re
import time

from ..errors import RunError


@contextlib.contextmanager
def data_errors():
    """Turn what a loader raises for bad data, or for a worker that died, into one line.

    That of a dead worker can come at any place of the main process, so that this goes around training as a whole.

    Raises:
        RunError: With the cause, and what to do.
    """
    try:
        try:
            yield
        except (ConnectionError, EOFError):
            time.sleep(2)  # a worker may have died while it sent a batch: torch is about to raise what killed it
            raise
    except RunError as e:
        if '\n' not in str(e):
            raise
        # Of a worker: its traceback, with the message as the last line.
        raise RunError(str(e).strip().splitlines()[-1].removeprefix(f'{RunError.__module__}.RunError: ')) from e
    except (EOFError, OSError, RuntimeError) as e:
        # While a batch is awaited, torch says what killed a worker only as the cause.
        message = _worker_failure(f'{e.__cause__}') or _worker_failure(str(e))
        if message is None:
            raise
        raise RunError(message) from e


def _worker_failure(error: str) -> str | None:
    """Return what the error of a loader says of a worker that died, None if it is of something else."""
    last = (error.strip().splitlines() or [''])[-1].removeprefix('RuntimeError: ')
    if 'Communication with the workers' in error or ('</torch_' in error and 'open files' in error):
        return f'data: {last} (raise ulimit -n, or take fewer --workers)'
    if '</torch_' in error or 'signal: Bus error' in error:
        return f'data: {last} (enlarge /dev/shm, or take fewer --workers)'
    if 'signal: Killed' in error:
        return f'data: {last} (probably the memory ran out: fewer --workers need less)'
    if re.search(r'DataLoader worker \(pid|in pin memory thread|Pin memory thread exited', error):
        return f'data: {last} (what it printed is above; with --workers 0 the cause shows)'
    return None
