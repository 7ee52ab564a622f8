"""The one error a user of this program is meant to read."""


class UsageError(Exception):
    """A wrong setting, missing file or impossible request: one line, what to do about it."""
