"""hub:ORG/NAME: a data set that no catalogue knows, from the hub's cache or a copy; no network."""

from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pytest

from pfedmoap_flwr.cli.main import main
from pfedmoap_flwr.data.images import ImageData, load_images
from pfedmoap_flwr.data.settings import ImageSettings
from pfedmoap_flwr.errors import UsageError
from support.copies import in_the_cache, png, read, write_parquet
from support.tiny import TINY

NAME = "hub:some-Lab/Leaf_Photos"
CLASSES = ["white_oak", "ash", "elm"]


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def leaves(folder: Path, splits: Any = ("train", "val"), **more: Any) -> Path:
    """Photos of leaves in columns of odd names; a pixel shows the class."""
    features = {"photo": datasets.Image(), "species": datasets.ClassLabel(names=CLASSES)}
    rows: dict[str, list[Any]] = {"photo": [], "species": []}
    for label in range(len(CLASSES)):
        rows["photo"] += [{"bytes": png(label), "path": None}] * 20
        rows["species"] += [label] * 20
    for name, feature in more.items():
        features[name], rows[name] = feature, ["old", "young"] * 30
        if isinstance(feature, datasets.Image):
            rows[name] = [{"bytes": png(9), "path": None}] * 60
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    return write_parquet(folder, dict.fromkeys(splits, table))


def assert_leaves(images: ImageData) -> None:
    assert images.classnames == ("ash", "elm", "white oak")
    for split, table in images.splits.items():
        assert len(table), split
        for row in table:
            name = CLASSES[read(row["image"])[0]].replace("_", " ")
            assert images.classnames[row["label"]] == name


def test_from_the_cache_columns_are_found_by_their_kind(tmp_path: Path) -> None:
    in_the_cache(tmp_path, NAME.removeprefix("hub:"), leaves(tmp_path / "copy"))
    images = load_images(ImageSettings(name=NAME))
    assert_leaves(images)
    assert images.provenance["source"] == "hub: some-Lab/Leaf_Photos"
    assert len(images.splits["validation"]) == 60
    assert images.template == "a photo of a {}."


def test_columns_that_are_named(tmp_path: Path) -> None:
    age = datasets.ClassLabel(names=["old", "young"])
    copy = leaves(tmp_path / "copy", age=age, mask=datasets.Image())
    named = ImageSettings(name=NAME, path=str(copy), image_column="photo", label_column="species")
    assert_leaves(load_images(named))
    by_text = leaves(tmp_path / "text", site=datasets.Value("string"))
    images = load_images(ImageSettings(name=NAME, path=str(by_text), label_column="site"))
    assert images.classnames == ("old", "young")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, r"data\.image-column: .* columns photo \(Image\), .*mask \(Image\).* the images"),
        (
            {"image_column": "photo"},
            r"data\.label-column: .* name the one with the names of classes",
        ),
        ({"image_column": "foto"}, r"data\.image-column='foto': "),
        ({"image_column": "photo", "label_column": "photo"}, r"data\.label-column='photo'"),
        ({"name": "hub:leaves"}, r"must be hub:ORG/NAME"),
        ({"name": "hub:../../etc"}, r"must be hub:ORG/NAME"),
        ({"name": "pacs", "label_column": "a"}, r"is for data\.name=hub:ORG/NAME, not pacs"),
        ({"path": ""}, r"some-Lab/Leaf_Photos cannot be loaded from the hub"),
    ],
)
def test_what_is_wrong_is_one_line(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    age = datasets.ClassLabel(names=["old", "young"])
    copy = leaves(tmp_path / "copy", age=age, mask=datasets.Image())
    with pytest.raises(UsageError, match=said):
        load_images(ImageSettings(**{"name": NAME, "path": str(copy), **settings}))


def test_a_run_has_a_folder_of_a_possible_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    in_the_cache(tmp_path, NAME.removeprefix("hub:"), leaves(tmp_path / "copy"))
    options = {**TINY, "data.name": NAME, "data.num-clients": 2, "num-server-rounds": 1}
    options |= {"data.partition": "iid", "local-epochs": 1}
    words = [f"{key}={value}" for key, value in options.items()]
    assert main(["run", "--method", "zeroshot", *words]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.endswith("-zeroshot-hub-some-Lab-Leaf_Photos-s0")
