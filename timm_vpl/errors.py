"""The two ways in which a command fails: it was asked for something wrong, or something went wrong while it ran."""


class UsageError(Exception):
    """A user's mistake: an option, a recipe or a path that can't be right. The message is one line."""
    exit_status = 2


class RunError(Exception):
    """A failure while running, with a message of one line instead of a traceback."""
    exit_status = 1


def first_line(error: BaseException, limit: int = 160) -> str:
    """Return the first line of an error's message, or its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:limit]
