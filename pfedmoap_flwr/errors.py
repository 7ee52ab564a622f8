"""The errors that a user of this program is meant to read."""


class UsageError(Exception):
    """A wrong setting, missing file or impossible request: one line, what to do about it."""


def last_line(text: object) -> str:
    """Return the last line of a text, or of an error, that is not blank; "" without one."""
    lines = [line for line in str(text).splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


def reason_of(error: BaseException) -> str:
    """Return an error in a line: the last of its text, or its kind where it has none."""
    return last_line(error) or type(error).__name__


class RunFailed(RuntimeError):
    """A run that started and could not go on; the message is the reason."""
