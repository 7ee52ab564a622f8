"""Files that survive a crash: replaced whole, the old content or the new; or grown by lines."""

import os
import threading
from io import FileIO
from pathlib import Path


def replace(path: Path, content: bytes | str, *, before: Path | None = None) -> None:
    """Write a file beside its place and move it there; the folder must exist. Text is UTF-8.

    before: where the old file goes, in the same folder, in place of the one that lies there.

    When this returns, the new content survives a power cut. Raises OSError, and then the old file
    is as it was, or lies at `before`.
    """
    # A name of its own for each writer, or two at once would write into one file
    part = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with create(part) as file:
            write(file, content.encode() if isinstance(content, str) else content)
        move(part, path, before=before)
    finally:
        part.unlink(missing_ok=True)


def create(path: Path) -> FileIO:
    """Open a new file for reading and writing; what lay there under this name is removed first.

    In a folder of several users it may be a link to a file of somebody else, which is left alone.
    """
    path.unlink(missing_ok=True)
    return FileIO(path, "x+")


def write(file: FileIO, content: bytes) -> None:
    """Write all of it: a nearly full disk takes a part and says so in a return value alone."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


def move(part: Path, path: Path, *, before: Path | None = None) -> None:
    """Move a finished file to its place in the same folder, its content on disk first.

    Stopped between two moves, nothing lies at `path` and the old content at `before`.
    """
    # A rename that reaches the disk before the content would leave an empty file
    _sync(part)
    if before and path.exists():
        os.replace(path, before)
    os.replace(part, path)
    _sync(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder and those above it that are missing. They survive a power cut."""
    absent = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in absent:
        _sync(folder.parent)


def nearest(path: Path) -> Path:
    """Return a path, or what is there already of the folders above it."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def append_line(path: Path, line: str) -> None:
    """Add a line to a text file. When this returns, it survives a power cut.

    A crash while it is written leaves a last line without its end, which readers leave out.
    """
    new = not path.exists()
    with path.open("a") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())
    if new:
        _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
