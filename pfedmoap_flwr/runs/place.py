"""Where a run lies: a folder that can be one, a new one for each run, one run at a time in it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from pfedmoap_flwr import files
from pfedmoap_flwr.config import Settings
from pfedmoap_flwr.errors import UsageError

LOCK = "run.lock"
SHOWN_LETTERS = 80


def stamp() -> str:
    """Return the time as the names of run folders begin with it."""
    return datetime.now().strftime("%Y%m%d-%H%M%S")


def default_path(settings: Settings) -> Path:
    """Return an unused runs/<time>-<method>-<dataset>-s<seed> of the current directory."""
    # hub:ORG/NAME is no name of a folder
    data = re.sub(r"[^\w.-]+", "-", settings.data.name)
    return unused(f"{stamp()}-{settings.method}-{data}-s{settings.seed}")


def unused(name: str) -> Path:
    """Return runs/<name> of the current directory, with a number where there is one already."""
    path = Path.cwd() / "runs" / name
    twin = 1
    while path.exists():
        twin += 1
        path = path.with_name(f"{name}-{twin}")
    return path


def new_folder(settings: Settings) -> Path:
    """Make a folder of the default name that no other run has, one begun in this second included.

    Raises UsageError where it cannot be made.
    """
    while True:
        path = default_path(settings)
        with _blaming("run-dir", str(path)):
            files.make_folder(path.parent)
            try:
                path.mkdir()
            except FileExistsError:  # between the two lines above
                continue
            return path


def folder_named(key: str, text: str) -> Path:
    """Return the absolute path of a folder that a setting names, whether it is there or not.

    Raises UsageError where there can be none.
    """
    with _blaming(key, text):
        text.encode()  # of a name that is no UTF-8 nothing could be read back
        path = Path(text).expanduser().resolve()
        if path.exists() and not path.is_dir():
            raise ValueError("is a file")
        return path


def make_folder(key: str, path: Path) -> None:
    """Make a folder that a setting names. Raises UsageError where it cannot be made."""
    with _blaming(key, str(path)):
        files.make_folder(path)


@contextmanager
def held(run_dir: Path, wait: float = 0) -> Iterator[None]:
    """Keep every other run out of a folder; a process that dies lets go of it.

    wait: seconds for which another run may still be at work there.

    Raises UsageError where another run is at work there.
    """
    lock = FileLock(run_dir / LOCK)
    try:
        lock.acquire(timeout=wait)
    except Timeout:
        raise UsageError(
            f"{run_dir}: another run is at work there; wait for its end, or give another run-dir"
        ) from None
    except (OSError, NotImplementedError) as error:
        raise UsageError(
            f"{run_dir}: cannot be locked ({error}); give a run-dir on another disk"
        ) from error
    with lock:
        yield


@contextmanager
def _blaming(key: str, text: str) -> Iterator[None]:
    """Turn what is wrong with a path into a UsageError of one line that names its setting."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        shown = text if len(text) <= SHOWN_LETTERS else f"{text[:SHOWN_LETTERS]}..."
        raise UsageError(f"setting {key}={shown!r}: {reason}; give another folder") from error
