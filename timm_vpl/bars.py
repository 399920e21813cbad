"""Progress bars: on a terminal only, and only if they are wanted."""
import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from timm.utils import setup_default_logging
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

_hidden = False


def set_output(quiet: bool, no_progress: bool, is_first: bool = True) -> None:
    """Set what this process prints: log lines, or with `quiet` warnings and errors only; bars, or none.

    Args:
        quiet: As of --quiet.
        no_progress: As of --no-progress.
        is_first: Whether it is the first process, which prints all; the others print errors only.
    """
    global _hidden
    _hidden = quiet or no_progress or not is_first
    root = logging.getLogger()
    if not root.handlers:
        setup_default_logging()
    if quiet or not is_first:
        root.setLevel(logging.WARNING if is_first else logging.ERROR)


@contextlib.contextmanager
def bar(what: str, unit: str, total: int | None = None, **kwargs: Any) -> Iterator[Any]:
    """Draw a progress bar, with log lines above it; `update(n)` advances it.

    Args:
        what: Its name.
        unit: What is counted.
        total: Their number, if it is known.
        **kwargs: Further arguments of tqdm.
    """
    with logging_redirect_tqdm(tqdm_class=tqdm), tqdm(
            desc=what, unit=f' {unit}', total=total, leave=False, dynamic_ncols=True,
            disable=_hidden or None, **kwargs) as found:
        yield found
