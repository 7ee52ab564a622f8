"""Files that survive a crash: replaced whole, the old content or the new; or grown by lines."""

import os
import threading
from pathlib import Path


def replace(path: Path, content: bytes | str) -> None:
    """Write a file beside its place and move it there; the folder must exist. Text is UTF-8.

    When this returns, the new content survives a power cut. Raises OSError, and then the old file
    is as it was.
    """
    # A name of its own for each writer, or two at once would write into one file
    part = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        move(part, path)
    finally:
        part.unlink(missing_ok=True)


def move(part: Path, path: Path) -> None:
    """Move a finished file to its place in the same folder, its content on disk first."""
    # A rename that reaches the disk before the content would leave an empty file
    _sync(part)
    os.replace(part, path)
    _sync(path.parent)


def append_line(path: Path, line: str) -> None:
    """Add a line to a text file. When this returns, it survives a power cut.

    A crash while it is written leaves a last line without its end, which readers leave out.
    """
    with path.open("a") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
