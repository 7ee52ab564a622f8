"""A file is replaced whole or not at all, and what was replaced is on disk."""

import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pfedmoap_flwr import files


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


def torn(part: Path, content: bytes) -> int:
    with part.open("wb") as file:
        file.write(content[: len(content) // 2])
    raise OSError(28, "No space left on device")


def interrupted(*args: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("place", "accident", "error"),
    [
        ("pathlib.Path.write_bytes", torn, OSError),
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


def test_content_is_on_disk_before_its_name_and_the_name_before_the_return(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    sync, rename = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        found = os.fstat(descriptor)
        if stat.S_ISDIR(found.st_mode):
            assert os.path.samestat(found, path.parent.stat())
            steps.append("folder")
        else:
            steps.append(f"file of {found.st_size} bytes")
        sync(descriptor)

    def renamed(part: Path, place: Path) -> None:
        steps.append(f"rename to {place.name}")
        rename(part, place)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    files.replace(path, b"12345")
    assert steps == ["file of 5 bytes", "rename to checkpoint", "folder"]


def test_writers_at_once_never_mix(path: Path) -> None:
    contents = [bytes([number]) * 100_000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda content: files.replace(path, content), contents * 4))
    assert path.read_bytes() in contents
    assert list(path.parent.iterdir()) == [path]


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.replace(tmp_path / "absent" / "file", "content")
