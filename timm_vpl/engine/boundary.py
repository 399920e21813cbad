"""The one boundary where foreign errors become a line: what happened, where in the run, what to try."""
import contextlib
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator

from ..errors import RunError, UsageError, first_line

# What the error says, and what to try.
ADVICE = (
    (r'Communication with the workers|(?s:</torch_.*open files)', 'raise ulimit -n, or use fewer --workers'),
    (r'</torch_|signal: Bus error', 'enlarge /dev/shm, or use fewer --workers'),
    (r'signal: Killed', 'probably out of memory: use fewer --workers'),
    (r'^\[Errno \d+\] Connection reset by peer',
     'probably a worker ran out of memory and was killed: use fewer --workers'),
    (r'DataLoader worker \(pid|in pin memory thread|Pin memory thread exited|connection to a loader worker',
     'see its output above; --workers 0 shows the cause'),
    (r'out of memory|DefaultCPUAllocator', 'use a smaller --batch-size, --grad-checkpointing or --amp'),
    (r'does not have a deterministic implementation|use_deterministic_algorithms', 'leave out --deterministic'),
    (r'No space left on device', 'make room on the disk'),
)


@contextlib.contextmanager
def refusing(where: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn errors of these kinds into a user's mistake, whose line begins with `where`."""
    try:
        yield
    except errors as e:
        raise UsageError(f'{where}: {first_line(e, 300)}') from e


def as_line(
        error: BaseException,
        place: str = '',
        what: str | None = None,
        folder: str | None = None,
        show: bool = False,
) -> RunError | UsageError:
    """Return an error with a message of one line; that of an unexpected one names a file with its traceback.

    Args:
        error: The error.
        place: Where in the run it occurred, '' if before it.
        what: What has happened, if the error itself is unclear.
        folder: Folder of the traceback; None for a temporary file.
        show: Print the traceback too.
    """
    if isinstance(error, (ConnectionError, EOFError)):
        try:
            time.sleep(2)  # a worker may have died while it sent a batch: torch is about to raise the reason
        except RuntimeError as e:
            error = e
    if show:
        traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, (RunError, UsageError)):
        return error if 'Traceback' not in str(error) else type(error)(
            _said(error).removeprefix(f'{RunError.__module__}.RunError: '))
    # While a batch is awaited, torch gives what killed a worker only as the cause.
    causes = [each for each in (error.__cause__, error) if each is not None]
    cause, advice = next(
        ((each, advice) for each in causes for pattern, advice in ADVICE if re.search(pattern, str(each))),
        (error, None))
    said = _said(cause)
    details = [said if what else None, place, None if what else advice, f'traceback: {_write(error, folder)}']
    return RunError(f'{what or said} ({"; ".join(filter(None, details))})')


def _said(error: BaseException) -> str:
    if 'Traceback' in str(error):  # that of a loader's worker, with the message as the last line
        return str(error).strip().splitlines()[-1]
    return f'{type(error).__name__}: {first_line(error, 300)}'


def _write(error: BaseException, folder: str | None) -> str:
    """Write an error's traceback to a new file and return the path."""
    for where in (folder, None):
        try:
            file = tempfile.NamedTemporaryFile(
                'w', prefix='traceback-' if where else 'timm-vpl-', suffix='.txt', dir=where, encoding='utf-8',
                errors='replace', delete=False)
        except OSError:
            continue
        with file:
            traceback.print_exception(error, file=file)
        return file.name
    return 'none, the disk is full'
