"""Arrays that are computed once and kept on disk, memory-mapped by all who read them.

A file is NumPy's .npy, followed by a checksum for each block of rows. While it is being computed it
is a .tmp: a pass that was stopped goes on after the last block that has its checksum.
"""

import contextlib
import logging
import math
import os
import time
import zlib
from collections.abc import Callable, Generator, Iterator
from io import FileIO
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.lib import format as npy

from pfedmoap_flwr import files
from pfedmoap_flwr.errors import UsageError

ENVIRONMENT_VARIABLE = "PFEDMOAP_CACHE"
ABANDONED = 24 * 3600  # seconds after which nobody will go on with a stopped pass
CHECKSUM = np.dtype("<u4")
logger = logging.getLogger("flwr.pfedmoap")

Compute = Callable[[int], Generator[np.ndarray, None, None]]
"""From a first row to the blocks from there on, each of `step` rows but the last."""


def cache_folder() -> Path:
    """Return the folder of computed features: $PFEDMOAP_CACHE or ~/.cache/pfedmoap."""
    return Path(os.environ.get(ENVIRONMENT_VARIABLE, "~/.cache/pfedmoap")).expanduser()


def file_of(name: str) -> Path:
    """Return where the array of that name is kept."""
    return cache_folder() / f"{name}.npy"


def kept(name: str, rows: int, step: int, compute: Compute) -> np.ndarray:
    """Return the array (rows, ...) of that name, computed where it is not on disk or is damaged.

    It is mapped copy-on-write: processes share its pages, and writing to it changes no file.
    Raises UsageError where the cache folder cannot be written.
    """
    path = file_of(name)
    array = _whole(path, rows, step)
    if array is None:
        # One process computes, the others wait for its file
        with _locked(path):
            array = _whole(path, rows, step)
            if array is None:
                if path.exists():
                    logger.warning("%s is damaged; it is computed again", path)
                _write(path, rows, step, compute)
                array = _whole(path, rows, step)
    if array is None:
        raise UsageError(
            f"{path} is not what was written to it; set {ENVIRONMENT_VARIABLE} to a folder on "
            "another disk"
        )
    return array


def _whole(path: Path, rows: int, step: int) -> np.ndarray | None:
    array, intact = _map(path, path.stem, rows, step)
    return array if intact == rows else None


def _map(path: Path, name: str, rows: int, step: int) -> tuple[np.memmap | None, int]:
    """Map a file, and count its intact rows up to the first block with a wrong checksum."""
    try:
        array = npy.open_memmap(path, mode="c")
        sums = np.fromfile(path, CHECKSUM, offset=array.offset + array.nbytes)
        if (len(array), len(sums)) != (rows, -(-rows // step)):
            return None, 0
    except Exception:  # NumPy's header is a Python literal: a damaged one can raise anything
        return None, 0
    for number, start in enumerate(range(0, rows, step)):
        if _checksum(name, array, array[start : start + step]) != sums[number]:
            return array, start
    return array, rows


def _checksum(name: str, array: np.ndarray, block: np.ndarray) -> int:
    # Name, shape and dtype are part of it: a renamed file or a damaged header does not pass
    seed = zlib.crc32(f"{name} {array.shape} {array.dtype.str}".encode())
    return zlib.crc32(np.ascontiguousarray(block).data, seed)


def _write(path: Path, rows: int, step: int, compute: Compute) -> None:
    """Write the file beside its place and move it there, going on after what is written already."""
    _sweep(path.parent)
    part = path.with_suffix(".tmp")
    # A link is nobody's stopped pass: what it leads to is not to be written
    array, done = (None, 0) if part.is_symlink() else _map(part, path.stem, rows, step)
    try:
        with _blaming(path.parent):
            file = _reopen(part) if done else files.create(part)
        with file, contextlib.closing(compute(done)) as blocks:
            for block in blocks:
                with _blaming(path.parent):
                    if array is None or not done:
                        array = _lay_out(file, (rows, *block.shape[1:]), block.dtype, step)
                    _put(file, array, block, done, step, _checksum(path.stem, array, block))
                done += len(block)
            with _blaming(path.parent):
                files.move(part, path)
    except UsageError:
        part.unlink(missing_ok=True)  # what is left of it would keep a full disk full
        raise


def _lay_out(file: FileIO, shape: tuple[int, ...], dtype: np.dtype, step: int) -> np.memmap:
    """Give an empty file its header and its full, sparse length; return the array it will be."""
    description = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    npy.write_array_header_1_0(file, description)
    blocks = -(-shape[0] // step)
    file.truncate(file.tell() + math.prod(shape) * dtype.itemsize + blocks * CHECKSUM.itemsize)
    return npy.open_memmap(file.name, mode="r")


def _put(
    file: FileIO, array: np.memmap, block: np.ndarray, start: int, step: int, checksum: int
) -> None:
    # Not through the memory map: on a full disk that kills the process, a write raises OSError
    _write_at(file, array.offset + start * array.strides[0], np.ascontiguousarray(block).tobytes())
    place = array.offset + array.nbytes + start // step * CHECKSUM.itemsize
    _write_at(file, place, np.array(checksum, CHECKSUM).tobytes())


def _write_at(file: FileIO, place: int, content: bytes) -> None:
    file.seek(place)
    files.write(file, content)


def _reopen(part: Path) -> FileIO:
    return FileIO(os.open(part, os.O_RDWR | os.O_NOFOLLOW), "r+")


def _sweep(folder: Path) -> None:
    """Remove what stopped writers left and nobody went on with."""
    for left in folder.glob("*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > ABANDONED:
                left.unlink()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with _blaming(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{path}.lock").acquire()
    with lock:
        yield


@contextlib.contextmanager
def _blaming(folder: Path) -> Iterator[None]:
    """Turn an OSError into a UsageError of one line that names the folder."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"image features cannot be kept in {folder} ({error.strerror or error}); make room "
            f"there, or set {ENVIRONMENT_VARIABLE} to another folder"
        ) from error
