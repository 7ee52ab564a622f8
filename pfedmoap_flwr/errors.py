"""The errors that a user of this program is meant to read."""


class UsageError(Exception):
    """A wrong setting, missing file or impossible request: one line, what to do about it."""


class RunFailed(RuntimeError):
    """A run that started and could not go on; the message is the reason, with its traceback."""
