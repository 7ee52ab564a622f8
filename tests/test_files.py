"""A file is replaced whole or not at all, and what was replaced is on disk."""

import os
import stat
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from pfedmoap_flwr import files
from support.disk import traced


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint"
    path.write_bytes(b"old")
    return path


def assert_old(path: Path) -> None:
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(("content", "found"), [("new é", "new é".encode()), (b"\x00\xff", None)])
def test_content_is_replaced(path: Path, content: str | bytes, found: bytes | None) -> None:
    files.replace(path, content)
    assert path.read_bytes() == (content if found is None else found)
    assert list(path.parent.iterdir()) == [path]


def test_a_new_file_has_the_permissions_of_any_other(path: Path) -> None:
    files.replace(path.with_name("new"), "")
    modes = [stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()]
    assert modes[0] == modes[1]


def torn(file: FileIO, content: bytes) -> None:
    file.write(content[: len(content) // 2])
    raise OSError(28, "No space left on device")


def interrupted(*args: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("place", "accident", "error"),
    [
        ("pfedmoap_flwr.files.write", torn, OSError),
        ("os.fsync", interrupted, KeyboardInterrupt),
        ("os.replace", interrupted, KeyboardInterrupt),
    ],
)
def test_a_write_that_fails_leaves_the_old_file(
    path: Path,
    place: str,
    accident: Callable[..., Any],
    error: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(place, accident)
        with pytest.raises(error):
            files.replace(path, b"new content")
    assert_old(path)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the operating system is asked to make lasting, in order."""
    return traced(monkeypatch)


def test_content_is_on_disk_before_its_name_and_the_name_before_the_return(
    path: Path, steps: list[str]
) -> None:
    files.replace(path, b"12345")
    folder = f"sync {path.parent.name}"
    assert steps == ["sync part of 5 bytes", "rename to checkpoint", folder]


def test_the_old_file_is_moved_aside_when_the_new_one_is_on_disk(
    path: Path, steps: list[str]
) -> None:
    files.replace(path, b"12345", before=path.with_name("old"))
    assert steps == [
        "sync part of 5 bytes",
        "rename to old",
        "rename to checkpoint",
        f"sync {path.parent.name}",
    ]
    assert [f.read_bytes() for f in (path, path.with_name("old"))] == [b"12345", b"old"]


def test_a_line_is_on_disk_before_the_return_and_so_is_the_name_of_a_new_file(
    tmp_path: Path, steps: list[str]
) -> None:
    files.append_line(tmp_path / "rounds", "12")
    files.append_line(tmp_path / "rounds", "345")
    assert steps == ["sync rounds of 3 bytes", f"sync {tmp_path.name}", "sync rounds of 7 bytes"]


def test_a_new_folder_is_on_disk_with_those_above_it(tmp_path: Path, steps: list[str]) -> None:
    files.make_folder(tmp_path / "run" / "client")
    files.make_folder(tmp_path / "run" / "client")
    assert sorted(steps) == sorted(["sync run", f"sync {tmp_path.name}"])


def test_a_planted_link_is_not_followed(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"somebody's")
    part = path.with_name(f".checkpoint.{os.getpid()}-{threading.get_ident()}.tmp")
    part.symlink_to(other)
    files.replace(path, b"new")
    assert (path.read_bytes(), other.read_bytes()) == (b"new", b"somebody's")
    assert not path.is_symlink()


def test_a_disk_that_takes_a_part_gets_the_rest(path: Path) -> None:
    class Sluggish(FileIO):
        def write(self, content: Any) -> int:
            return super().write(content[:2])

    with Sluggish(path, "w") as file:
        files.write(file, b"12345")
    assert path.read_bytes() == b"12345"


def test_writers_at_once_never_mix(path: Path) -> None:
    contents = [bytes([number]) * 100_000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda content: files.replace(path, content), contents * 4))
    assert path.read_bytes() in contents
    assert list(path.parent.iterdir()) == [path]


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.replace(tmp_path / "absent" / "file", "content")
