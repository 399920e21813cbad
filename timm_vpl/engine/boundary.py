"""The one place where an error that nothing expected becomes a line: what, where in the run, what to try."""
import re
import sys
import tempfile
import traceback

from ..errors import RunError, UsageError, first_line

# What the error says, and what to try.
ADVICE = (
    (r'Communication with the workers|(?s:</torch_.*open files)', 'raise ulimit -n, or take fewer --workers'),
    (r'</torch_|signal: Bus error', 'enlarge /dev/shm, or take fewer --workers'),
    (r'signal: Killed', 'probably the memory ran out: fewer --workers need less'),
    (r'DataLoader worker \(pid|in pin memory thread|Pin memory thread exited|connection to a loader worker',
     'what it printed is above; with --workers 0 the cause shows'),
    (r'out of memory|DefaultCPUAllocator', 'a smaller --batch-size, --grad-checkpointing or --amp needs less'),
    (r'does not have a deterministic implementation|use_deterministic_algorithms', 'leave out --deterministic'),
    (r'No space left on device', 'make room on the disk'),
)


def as_line(
        error: BaseException,
        place: str = '',
        what: str | None = None,
        folder: str | None = None,
        show: bool = False,
) -> Exception:
    """Return an error with a message of one line; that of an unexpected one names a file with its traceback.

    Args:
        error: The error.
        place: Where in the run it came, '' before.
        what: What has happened, where the error itself says little.
        folder: Folder of the traceback; None for a temporary file.
        show: Print the traceback too.
    """
    if show:
        traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, (RunError, UsageError)):
        # Of a loader's worker: its traceback, with the message as the last line.
        last = str(error).strip().splitlines()[-1].removeprefix(f'{RunError.__module__}.RunError: ')
        return error if '\n' not in str(error) else type(error)(last)
    # While a batch is awaited, torch says what killed a worker only as the cause.
    texts = [text for text in (str(error.__cause__ or ''), str(error)) if text.strip()]
    known = next(((text, each) for text in texts for pattern, each in ADVICE if re.search(pattern, text)), None)
    said, advice = f'{type(error).__name__}: {first_line(error, 300)}', None
    if known and not what:
        said, advice = known[0].strip().splitlines()[-1].removeprefix('RuntimeError: '), known[1]
    details = [said if what else None, place, advice, f'traceback: {_write(error, folder)}']
    return RunError(f'{what or said} ({"; ".join(filter(None, details))})')


def _write(error: BaseException, folder: str | None) -> str:
    """Write an error's traceback to a file of its own and return the path."""
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
