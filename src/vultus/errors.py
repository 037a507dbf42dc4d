"""Exceptions that the command line turns into an exit code, and a notebook into a line."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something the user can mend. The message is one line: what is wrong, with the file or key, and the remedy.

    The command line prints it as `vultus: error: <message>` and exits with code 2.
    """


class Stopped(Exception):
    """A signal asked the training to stop; the checkpoint is written. `signal` is its number."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


@contextmanager
def told() -> Iterator[None]:
    """Print a UserError as one line and go on behind the block: the other cells of a notebook still run."""
    try:
        yield
    except UserError as error:
        print(f"left out: {error}")


def in_one_line(error: Exception) -> str:
    """An exception in one line of bounded length."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
