"""The one exception that a user is meant to read."""


class UserError(Exception):
    """Something the user can mend. The message is one line: what is wrong, with the file or key, and the remedy.

    The command line prints it as `vultus: error: <message>` and exits with code 2.
    """
