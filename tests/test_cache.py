"""An array on disk: mapped, whole or not at all; a damaged or stopped file costs time alone."""

import logging
import multiprocessing
import os
import time
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pfedmoap_flwr import cache as store
from pfedmoap_flwr import files
from pfedmoap_flwr.cache import kept
from pfedmoap_flwr.errors import UsageError


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("PFEDMOAP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


ROWS, STEP = 10, 4


def blocks(start: int) -> Iterator[np.ndarray]:
    values = np.arange(ROWS * 6, dtype=np.float32).reshape(ROWS, 2, 3)
    for first in range(start, ROWS, STEP):
        yield values[first : first + STEP]


def kept_blocks(compute: Any = blocks) -> np.ndarray:
    return kept("name", ROWS, STEP, compute)


def test_an_array_is_kept_as_numpy_writes_it(cache: Path) -> None:
    array = kept_blocks()
    assert array.tolist() == np.arange(ROWS * 6).reshape(ROWS, 2, 3).tolist()
    assert np.load(cache / "name.npy").tolist() == array.tolist()
    assert kept_blocks(None).tolist() == array.tolist()


@pytest.mark.parametrize("damage", ["empty", "garbage", "short", "long", "zeroed", "gone"])
def test_a_damaged_file_is_computed_again(
    damage: str, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = kept_blocks().tolist()
    path = cache / "name.npy"
    content = path.read_bytes()
    damaged = {
        "empty": b"",
        "garbage": b"garbage" * 100,
        "short": content[:-8],
        "long": content + b"\0" * 4,
        "zeroed": content[:200] + bytes(len(content) - 200),
        "gone": None,
    }[damage]
    path.unlink()
    if damaged is not None:
        path.write_bytes(damaged)
    with caplog.at_level(logging.WARNING):
        assert kept_blocks().tolist() == expected
    assert caplog.text.count("is damaged") == (damage != "gone")
    assert path.read_bytes() == content


@pytest.mark.slow
def test_one_flipped_bit_is_noticed_wherever_it_is(cache: Path) -> None:
    expected = kept_blocks().tolist()
    path = cache / "name.npy"
    content = path.read_bytes()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        assert kept_blocks().tolist() == expected, place
    assert len(content) > 128 + ROWS * 24


@pytest.mark.parametrize("stale", ["name", "dtype", "shape", "rows"])
def test_a_file_of_something_else_is_computed_again(stale: str, cache: Path) -> None:
    values: np.ndarray = np.ones(
        (ROWS - (stale == "rows"), 2, 3), np.float64 if stale == "dtype" else "f4"
    )
    values = values.reshape(len(values), 6) if stale == "shape" else values

    def other(start: int) -> Iterator[np.ndarray]:
        yield from (values[i : i + STEP] for i in range(start, len(values), STEP))

    kept("other", len(values), STEP, other)  # type: ignore[arg-type]
    (cache / "other.npy").rename(cache / "name.npy")
    assert kept_blocks()[0, 0].tolist() == [0, 1, 2]


def stopping(after: int, error: BaseException) -> Any:
    def compute(start: int) -> Iterator[np.ndarray]:
        for number, block in enumerate(blocks(start)):
            if number == after:
                raise error
            yield block

    return compute


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no memory")])
def test_a_stopped_pass_leaves_no_half_file_and_is_gone_on_with(
    error: BaseException, cache: Path
) -> None:
    with pytest.raises(type(error)):
        kept_blocks(stopping(2, error))
    assert not list(cache.glob("*.npy"))
    starts = []

    def resumed(start: int) -> Iterator[np.ndarray]:
        starts.append(start)
        return blocks(start)

    interrupted = kept_blocks(resumed)
    assert starts == [8]
    content = (cache / "name.npy").read_bytes()
    assert not list(cache.glob("*.tmp"))
    (cache / "name.npy").unlink()
    assert kept_blocks().tolist() == interrupted.tolist()
    assert (cache / "name.npy").read_bytes() == content


def test_a_stopped_pass_with_a_torn_block_is_gone_on_with_before_it(cache: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        kept_blocks(stopping(2, KeyboardInterrupt()))
    part = cache / "name.tmp"
    content = bytearray(part.read_bytes())
    content[128 + 4 * 24 + 5] ^= 1
    part.write_bytes(content)
    starts = []

    def resumed(start: int) -> Iterator[np.ndarray]:
        starts.append(start)
        return blocks(start)

    assert kept_blocks(resumed).tolist() == np.arange(60).reshape(10, 2, 3).tolist()
    assert starts == [4]


def test_what_killed_writers_left_is_swept(cache: Path) -> None:
    cache.mkdir()
    for name in ("old", "young"):
        (cache / f"{name}.tmp").write_bytes(b"half")
    then = time.time() - store.ABANDONED - 10
    os.utime(cache / "old.tmp", (then, then))
    kept_blocks()
    assert [path.name for path in cache.glob("*.tmp")] == ["young.tmp"]


def _killed(cache: str) -> None:
    os.environ["PFEDMOAP_CACHE"] = cache

    def compute(start: int) -> Iterator[np.ndarray]:
        yield next(blocks(start))
        os._exit(9)

    kept_blocks(compute)


@pytest.mark.processes
def test_a_killed_writer_stops_nobody(cache: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(str(cache),))
    process.start()
    process.join()
    assert process.exitcode == 9
    assert [path.suffix for path in cache.iterdir() if path.suffix != ".lock"] == [".tmp"]
    assert kept_blocks().tolist() == np.arange(60).reshape(10, 2, 3).tolist()
    assert not list(cache.glob("*.tmp"))


@pytest.mark.parametrize("planted", ["another file", "a stopped pass"])
def test_a_planted_link_is_not_followed(planted: str, cache: Path, tmp_path: Path) -> None:
    cache.mkdir()
    if planted == "a stopped pass":
        with pytest.raises(KeyboardInterrupt):
            kept_blocks(stopping(2, KeyboardInterrupt()))
        (cache / "name.tmp").rename(tmp_path / "other")
    else:
        (tmp_path / "other").write_bytes(b"somebody's")
    before = (tmp_path / "other").read_bytes()
    (cache / "name.tmp").symlink_to(tmp_path / "other")
    assert kept_blocks().tolist() == np.arange(60).reshape(10, 2, 3).tolist()
    assert (tmp_path / "other").read_bytes() == before
    assert not (cache / "name.npy").is_symlink()


# One line says what to do


def said(error: pytest.ExceptionInfo[UsageError], cache: Path, reason: str) -> None:
    line = str(error.value)
    assert "\n" not in line
    assert all(word in line for word in (str(cache), "PFEDMOAP_CACHE", reason)), line


def test_a_full_disk_is_said_and_not_kept_full(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FullDisk(FileIO):
        def write(self, content: Any) -> int:
            if self.tell() == 0:  # a header still fits
                return super().write(content)
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "create", lambda path: FullDisk(path, "x+"))
    with pytest.raises(UsageError) as error:
        kept_blocks()
    said(error, cache, "No space left on device")
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_an_unwritable_folder_is_said(cache: Path) -> None:
    cache.write_text("a file, not a folder")
    with pytest.raises(UsageError) as error:
        kept_blocks()
    said(error, cache, "")


def test_a_disk_that_loses_bytes_is_said(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def losing(part: Path, path: Path) -> None:
        os.truncate(part, 300)
        move(part, path)

    move = files.move
    monkeypatch.setattr(files, "move", losing)
    with pytest.raises(UsageError) as error:
        kept_blocks()
    said(error, cache, "not what was written")


def test_an_image_that_cannot_be_read_is_not_the_caches_fault(cache: Path) -> None:
    with pytest.raises(OSError, match="no such image"):
        kept_blocks(stopping(1, OSError("no such image")))


def test_a_cache_that_is_there_needs_no_writing(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept_blocks()
    monkeypatch.setattr(store, "FileLock", None)
    assert len(kept_blocks(None)) == ROWS
