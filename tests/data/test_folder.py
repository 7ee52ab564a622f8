"""Images of one's own: folders, CSV, saved data sets; nodes that each have a folder."""

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest

from pfedmoap_flwr.data import SPLITS
from pfedmoap_flwr.data.images import ImageData, load_images
from pfedmoap_flwr.data.settings import ImageSettings
from pfedmoap_flwr.data.sources import folder as folders
from pfedmoap_flwr.data.sources.scan import scan
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.logs import Slow
from support.copies import png, read, write_tree

PETS = {"cat": 20, "red_panda": 20}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def load(path: Path, **changes: Any) -> ImageData:
    return load_images(ImageSettings(name="folder", path=str(path), **changes))


def sizes(images: ImageData) -> list[int]:
    return [len(images.splits[split]) for split in SPLITS]


def assert_joined(images: ImageData, names: Sequence[str]) -> None:
    """Every image's label is the class that its colour shows."""
    for split in SPLITS:
        for row in images.splits[split]:
            assert images.classnames[row["label"]] == names[read(row["image"])[0]]


# Ways to lay images out


def test_a_tree_with_splits_is_taken_as_it_is(tmp_path: Path) -> None:
    for split, count in (("train", 6), ("val", 3), ("test", 4)):
        write_tree(tmp_path / split, dict.fromkeys(PETS, count))
    images = load(tmp_path)
    assert images.classnames == ("cat", "red panda")
    assert images.template == "a photo of a {}."
    assert images.domains == ("",)
    assert sizes(images) == [12, 6, 8]
    assert_joined(images, images.classnames)


def test_a_tree_without_splits_is_cut(tmp_path: Path) -> None:
    images = load(write_tree(tmp_path, PETS))
    assert sizes(images) == [28, 4, 8]
    assert "test: 20% of train" in images.provenance["splits"]
    assert_joined(images, images.classnames)
    assert sizes(load(tmp_path, validation=0.0)) == [32, 0, 8]


def test_domains_are_a_level_of_folders(tmp_path: Path) -> None:
    for number, domain in enumerate(["photo", "sketch"]):
        write_tree(tmp_path / "train" / domain, PETS, domain=number)
    images = load(tmp_path)
    assert images.domains == ("photo", "sketch")
    for split in SPLITS:
        for row in images.splits[split]:
            assert read(row["image"]) == (row["label"], row["domain"])


def test_mixed_depths_are_refused_with_examples(tmp_path: Path) -> None:
    write_tree(tmp_path, PETS)
    write_tree(tmp_path / "photo", PETS)
    with pytest.raises(UsageError, match=r"there is cat/0\.png and photo/cat/0\.png"):
        load(tmp_path)


def test_images_outside_classes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(png(0))
    with pytest.raises(UsageError, match=r"there is x\.png"):
        load(tmp_path)


@pytest.mark.parametrize("columns", [("path", "label"), ("path", "label", "split", "domain")])
def test_a_csv(tmp_path: Path, columns: tuple[str, ...]) -> None:
    write_tree(tmp_path / "images", PETS)
    lines = [",".join(columns)]
    for name in PETS:
        for number in range(20):
            split = "test" if number < 5 else "train"
            values = [f"images/{name}/{number}.png", name, split, "photo"]
            lines.append(",".join(values[: len(columns)]))
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    images = load(tmp_path / "labels.csv")
    assert_joined(images, ("cat", "red panda"))
    assert sizes(images) == ([28, 4, 8] if len(columns) == 2 else [26, 4, 10])
    assert images.domains == (("",) if len(columns) == 2 else ("photo",))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "file,class\n",
            "expected columns path, label and maybe split, domain; found 'file, class'",
        ),
        ("path,label\na.png,\n", "line 2"),
        ("path,label,split\na.png,cat,later\n", "line 2"),
    ],
)
def test_a_wrong_csv_is_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(UsageError, match=said):
        load(tmp_path / "labels.csv")


@pytest.mark.parametrize("split", [True, False])
def test_a_saved_data_set(tmp_path: Path, split: bool) -> None:
    rows = {
        "image": [{"bytes": png(i % 2), "path": None} for i in range(40)],
        "label": [i % 2 for i in range(40)],
    }
    # Label order is the file's own: names decide
    names = ["zebra", "ant"]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    )
    saved = datasets.Dataset.from_dict(rows, features=features)
    whole = datasets.DatasetDict({"train": saved, "test": saved}) if split else saved
    whole.save_to_disk(str(tmp_path / "saved"))
    images = load(tmp_path / "saved")
    assert images.classnames == ("ant", "zebra")
    assert sizes(images) == ([36, 4, 40] if split else [28, 4, 8])
    assert_joined(images, names)


# The agreed class list


def test_a_given_list_decides_the_order(tmp_path: Path) -> None:
    write_tree(tmp_path / "images", PETS)
    images = load(tmp_path / "images", classnames="Red Panda, dog ,cat")
    assert images.classnames == ("Red Panda", "dog", "cat")
    assert_joined(images, ("cat", "Red Panda"))
    (tmp_path / "classes.txt").write_text("dog\nred_panda\n\ncat\n")
    images = load(tmp_path / "images", classnames=str(tmp_path / "classes.txt"))
    assert images.classnames == ("dog", "red panda", "cat")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("cat,dog", "class 'red panda' of the images is not in setting data.classnames"),
        ("cat,Cat,red panda", "more than once"),
        ("nowhere.txt", "no such file"),
    ],
)
def test_a_wrong_list_is_named(tmp_path: Path, given: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load(write_tree(tmp_path, PETS), classnames=given)


def test_no_images_need_a_list(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no images there"):
        load(tmp_path)
    assert sizes(load(tmp_path, classnames="cat,dog")) == [0, 0, 0]
    with pytest.raises(UsageError, match=r"set data\.path to your images"):
        load_images("folder")


# Broken images


def break_two(root: Path) -> None:
    (root / "cat" / "3.png").write_bytes(b"no image")
    whole = root / "red_panda" / "7.png"
    whole.write_bytes(whole.read_bytes()[:40])


def test_broken_images_are_named_and_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    break_two(write_tree(tmp_path, PETS))
    with caplog.at_level("WARNING", "flwr.pfedmoap"):
        images = load(tmp_path)
    assert sum(sizes(images)) == 38
    assert images.provenance["broken"] == 2
    said = [record.getMessage() for record in caplog.records]
    assert any(str(tmp_path / "cat" / "3.png") in line for line in said)
    assert any(str(tmp_path / "red_panda" / "7.png") in line for line in said)
    with pytest.raises(UsageError, match=r"broken image .*3\.png: UnidentifiedImageError"):
        load(tmp_path, strict=True)


def test_images_are_decoded_once_until_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = folders.to_tables(folders.read_tree(write_tree(tmp_path, PETS)))
    assert scan(tables["train"]).broken == {}
    with monkeypatch.context() as patch:
        patch.setattr("PIL.Image.open", lambda file: pytest.fail("decoded again"))
        assert scan(tables["train"]).broken == {}
    break_two(tmp_path)
    assert len(scan(tables["train"]).broken) == 2


def test_a_missing_file_of_a_csv_is_broken(tmp_path: Path) -> None:
    write_tree(tmp_path, PETS)
    paths = [f"{name}/{number}.png,{name}" for name in PETS for number in range(21)]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label", *paths]))
    images = load(tmp_path / "labels.csv")
    assert images.provenance["broken"] == 2
    assert sum(sizes(images)) == 40


# A folder that is none of images


def test_a_disk_without_images_is_refused_by_its_first_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each folder that is read counts: of all there are, no more than the limit asks for."""
    monkeypatch.setattr(folders, "MOST_OTHERS", 30)
    for number in range(50):
        place = tmp_path / f"{number:02d}" / "deep"
        place.mkdir(parents=True)
        (place / "a.log").write_text("")
    seen, walk = [], os.walk

    def counted(*args: Any, **options: Any) -> Iterator[Any]:
        for found in walk(*args, **options):
            seen.append(found[0])
            yield found

    monkeypatch.setattr(os, "walk", counted)
    said = r"no image is among the first 31 files and folders there, up to .*/09/deep; give the"
    with pytest.raises(UsageError, match=said):
        load(tmp_path)
    assert len(seen) == 21


def test_parquet_files_far_below_make_no_copy_of_the_hub(tmp_path: Path) -> None:
    write_tree(tmp_path, PETS)
    (tmp_path / "a/b/c/d").mkdir(parents=True)
    (tmp_path / "a/b/c/d/x.parquet").write_text("none of a data set")
    assert sizes(load(tmp_path)) == [28, 4, 8]


def test_a_scan_that_takes_long_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Slow, "FIRST", 0.0)
    load(write_tree(tmp_path, PETS))
    assert f"reading {tmp_path}: 0 images among 0 files and folders so far" in caplog.text
    assert "decoding images to find broken ones: " in caplog.text
