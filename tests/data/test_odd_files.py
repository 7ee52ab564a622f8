"""Odd files among one's own images: each is skipped and named, or refused in one line."""

import logging
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from pfedmoap_flwr.clip import features
from pfedmoap_flwr.data import labels
from pfedmoap_flwr.data.images import ImageData, load_images
from pfedmoap_flwr.data.settings import ImageSettings
from pfedmoap_flwr.data.sources.scan import MOST_PIXELS
from pfedmoap_flwr.errors import UsageError
from support.copies import png, write_tree
from support.tiny import frozen_clip

PETS = {"cat": 10, "dog": 10}
LATIN1 = os.fsdecode(b"caf\xe9")


def load(path: Path, classnames: str = "") -> ImageData:
    return load_images(ImageSettings(name="folder", path=str(path), classnames=classnames))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "images", PETS)


def wide(path: Path) -> None:
    Image.new("1", (10_000, 5_001)).save(path, "PNG")


def to_zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def to_itself(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("make", "name", "said"),
    [
        (os.mkfifo, "x.png", "x.png (not a regular file)"),
        (to_zeros, "x.png", "x.png (not a regular file)"),
        (to_itself, "x.png", "Too many levels of symbolic links"),
        (wide, "x.png", "x.png (50010000 pixels; at most 50000000 are read)"),
        (lambda path: path.write_bytes(png(0)), f"{LATIN1}.png", r"caf\xe9.png (not there, or its"),
    ],
)
def test_what_is_no_image_to_read_is_skipped_and_named(
    root: Path,
    make: Callable[[Path], object],
    name: str,
    said: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    make(root / "cat" / name)
    loaded: list[ImageData] = []
    # What opens a pipe waits for ever
    thread = threading.Thread(target=lambda: loaded.append(load(root)), daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert sum(len(split) for split in loaded[0].splits.values()) == 20
    assert loaded[0].provenance["broken"] == 1
    assert said in " ".join(record.getMessage() for record in caplog.records)


def test_the_largest_image_that_is_read(root: Path) -> None:
    Image.new("1", (10_000, 5_000)).save(root / "cat" / "x.png", "PNG")
    assert load(root).provenance["broken"] == 0
    assert (Image.MAX_IMAGE_PIXELS or 0) > MOST_PIXELS


def test_a_class_folder_whose_name_is_not_utf8_is_skipped(root: Path) -> None:
    write_tree(root, {LATIN1: 3})
    images = load(root)
    assert images.provenance["broken"] == 3
    assert sum(len(split) for split in images.splits.values()) == 20


@pytest.mark.parametrize("target", ["", "cat"])
def test_a_folder_that_is_there_twice_is_refused(root: Path, target: str) -> None:
    for name in ("mouse", "zebra"):
        (root / name).symlink_to(root / target)
    with pytest.raises(
        UsageError, match=r"mouse is /\S+ again, by a link; remove the link"
    ) as said:
        load(root)
    assert len(str(said.value)) < 500


def test_what_is_no_data_set_is_refused_at_its_first_image(tmp_path: Path) -> None:
    for number in range(3):
        write_tree(tmp_path / f"a/b/c/d/{number}", PETS)
    with pytest.raises(UsageError, match=r"there is a/b/c/d/0/cat/0\.png$"):
        load(tmp_path)


@pytest.mark.parametrize("path", ["/dev/zero", "pipe"])
def test_a_device_or_pipe_is_no_list_of_images(tmp_path: Path, path: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="neither a folder nor a regular file"):
        load(tmp_path / path)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("a\0.png,cat", "line 2: needs a path"),
        (f"a.png,{200_000 * 'x'}", "line 2: no CSV"),
        (f"a.png,cat,{100_000 * 'x'}", "line 2: needs a path"),
    ],
)
def test_a_csv_that_is_none_is_named_with_its_line(tmp_path: Path, row: str, said: str) -> None:
    (tmp_path / "labels.csv").write_text(f"path,label,split\n{row}\n")
    with pytest.raises(UsageError, match=said) as caught:
        load(tmp_path / "labels.csv")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("content", [b"", b"\n \n_\n", b"\xef\xbb\xbf\n"])
def test_a_list_without_names_is_refused(root: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "classes.txt").write_bytes(content)
    for given in (",,,", " , ", str(tmp_path / "classes.txt")):
        with pytest.raises(UsageError, match=r"setting data\.classnames=.*: names no class"):
            load(root, given)


def test_a_binary_list_is_refused(root: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_bytes(b"cat\n\xff\xfe")
    with pytest.raises(UsageError, match="cannot be read as UTF-8 text"):
        load(root, str(tmp_path / "classes.txt"))


def test_very_many_classes_are_refused_at_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ",".join(["cat", "dog", *map(str, range(200_000))])
    with pytest.raises(UsageError, match="200002 classes; at most 50000 are read"):
        load(root, names)
    monkeypatch.setattr(labels, "MOST_CLASSES", 2)
    assert load(root).classnames == ("cat", "dog")


def test_images_are_decoded_one_by_one(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[weakref.ref[Image.Image]] = []
    alive: list[int] = []
    decode = datasets.Image.decode_example

    def counting(feature: datasets.Image, *said: Any, **named: Any) -> Image.Image:
        image = decode(feature, *said, **named)
        decoded.append(weakref.ref(image))
        alive.append(sum(each() is not None for each in decoded))
        return image

    images = load(root).splits["train"]
    monkeypatch.setattr(datasets.Image, "decode_example", counting)
    assert len(features.read_images(frozen_clip(), images, features.Reading())) == len(images)
    assert len(alive) == len(images)
    assert max(alive) <= 2
