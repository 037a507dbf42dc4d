"""Exceptions that the command line turns into an exit code and an error message of one line."""


class UserError(Exception):
    """An error that the user can fix. The message is one line: what is wrong, with the file or key, and the remedy.

    The command line prints it as `vultus: error: <message>` and exits with code 2.
    """


class Stopped(Exception):
    """Training was stopped by a signal, after it had written a checkpoint. `signal` is the number of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


def in_one_line(error: Exception) -> str:
    """The message of an exception (or its type, if it has none) in one line of at most 200 characters."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
