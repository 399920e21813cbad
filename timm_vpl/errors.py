"""The ways in which a command ends early: a usage error, a failure, or a signal to stop."""


class UsageError(Exception):
    """A user's mistake: an option, a recipe or a path that can't be right. The message is one line."""
    exit_status = 2


class RunError(Exception):
    """A failure while running, with a message of one line instead of a traceback."""
    exit_status = 1


class Stopped(Exception):
    """A run that ends early because of a signal; the message is one line."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_status = 128 + signal_number


def first_line(error: BaseException, limit: int = 160) -> str:
    """Return the first line of an error's message, or its class if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:limit]
