"""Images of one's own: folders, CSV, saved data sets; nodes that each have a folder."""

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from pfedmoap_flwr import config
from pfedmoap_flwr.data import SPLITS
from pfedmoap_flwr.data.images import ImageData, load_images
from pfedmoap_flwr.data.settings import ImageSettings
from pfedmoap_flwr.data.sources import folder as folders
from pfedmoap_flwr.engines import in_process
from pfedmoap_flwr.engines.in_process import FIRST_NODE_ID, InProcessGrid
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.federation import client
from pfedmoap_flwr.report import tables
from pfedmoap_flwr.runs.folder import RunFolder
from support.copies import png, read, write_tree
from support.tiny import TINY

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
        ("file,class\n", "expected columns path, label and maybe split, domain; found file, class"),
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
    assert folders.broken(tables["train"]) == {}
    with monkeypatch.context() as patch:
        patch.setattr(folders, "_reason", lambda image: pytest.fail("decoded again"))
        assert folders.broken(tables["train"]) == {}
    break_two(tmp_path)
    assert len(folders.broken(tables["train"])) == 2


def test_a_missing_file_of_a_csv_is_broken(tmp_path: Path) -> None:
    write_tree(tmp_path, PETS)
    paths = [f"{name}/{number}.png,{name}" for name in PETS for number in range(21)]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label", *paths]))
    images = load(tmp_path / "labels.csv")
    assert images.provenance["broken"] == 2
    assert sum(sizes(images)) == 40


# A folder per node


def context(number: int, folder: Path, flat: dict[str, Any]) -> Any:
    node = {"partition-id": number, "num-partitions": 9, "data-dir": str(folder)}
    return in_process._context(FIRST_NODE_ID + number, node, config.parse(flat).flat())


def query(folder: Path, **flat: Any) -> dict[str, Any]:
    """Return the card of client 3 that has its own folder."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    content = RecordDict({"config": ConfigRecord({"run": "run"})})
    message = Message(content, FIRST_NODE_ID + 3, "query")
    found = client.query(message, context(3, folder, {**TINY, **flat}))
    return dict(found["card"])


Federation = Callable[..., RunFolder]


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    """Run nodes that each have a folder; the run folder says what came of it."""

    def run(dirs: Sequence[Path], **flat: Any) -> RunFolder:
        import client_app
        import server_app

        run_dir = tmp_path / "run"
        settings = {**TINY, "num-server-rounds": 1, "local-epochs": 1, **flat}
        settings |= {"data.num-clients": len(dirs), "run-dir": str(run_dir)}
        settings |= {"state-dir": str(run_dir / "clients")}
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        contexts = {FIRST_NODE_ID + i: context(i, path, settings) for i, path in enumerate(dirs)}
        server = in_process._context(0, {}, config.parse(settings).flat())
        server_app.app(InProcessGrid(client_app.app, contexts), server)
        return RunFolder(run_dir)

    return run


def node_folder(root: Path, counts: dict[str, int], tests: int = 2) -> Path:
    """Training images by class, and some test images of each."""
    write_tree(root / "train", counts)
    write_tree(root / "test", dict.fromkeys(counts, tests))
    return root


def test_a_node_is_its_whole_folder(tmp_path: Path) -> None:
    card = query(write_tree(tmp_path / "here", PETS))
    assert card["client"] == 3
    assert [card[f"num-{split}"] for split in SPLITS] == [28, 4, 8]
    assert card["classnames"] == ["cat", "red panda"]
    assert card["classes"] == 2
    assert str(tmp_path) not in json.dumps(card, default=str)
    assert query(tmp_path / "here", **{"data.shots": 5})["num-train"] == 10


def test_what_is_wrong_with_a_node_names_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"client 3, data-dir=.*/absent: .* nothing at"):
        query(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"client 3, data-dir=.*/empty: .* no images there"):
        query(tmp_path / "empty")


@pytest.mark.parametrize("method", ["pfedmoap", "promptfl"])
def test_folders_of_two_nodes_federate(tmp_path: Path, federation: Federation, method: str) -> None:
    dirs = [node_folder(tmp_path / f"node-{i}", PETS) for i in range(2)]
    run = federation(dirs, method=method)
    assert not any(record.failed for record in run.rounds())
    (data,) = json.loads((run.path / "data.json").read_text())
    assert data["clients"] == [0, 1]
    assert data["sizes"] == {"train": 36, "validation": 4, "test": 4}
    assert str(tmp_path) not in json.dumps(data)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"cat": 9, "dog": 9}, "client 1: missing 'red panda'; extra 'dog'"),
        ({"cat": 9}, "client 1: missing 'red panda'"),
        ({"cat": 9, "red_panda": 9, "yak": 9}, "client 1: extra 'yak'"),
    ],
)
def test_class_lists_that_differ(
    tmp_path: Path, federation: Federation, other: dict[str, int], said: str
) -> None:
    dirs = [node_folder(tmp_path / "a", PETS), node_folder(tmp_path / "b", other)]
    with pytest.raises(UsageError, match=rf"do not know the same classes; {said}; give all"):
        federation(dirs)


def test_another_order_is_told(tmp_path: Path, federation: Federation) -> None:
    lists = tmp_path / "lists"
    lists.mkdir()
    for number, text in enumerate(["cat\nred panda\nyak", "cat\nyak\nred panda"]):
        (lists / f"{number}.txt").write_text(text)
    dirs = [node_folder(tmp_path / str(i), PETS) for i in range(2)]
    # A path may hold another file on another machine
    shared = lists / "classes.txt"
    shutil.copy(lists / "0.txt", shared)
    from pfedmoap_flwr.data import images

    given = images._given
    answers = iter([lists / "0.txt", lists / "1.txt"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "_given", lambda text: given(str(next(answers))))
        with pytest.raises(
            UsageError, match="another order, number 1 is 'yak' instead of 'red pan"
        ):
            federation(dirs, **{"data.classnames": str(shared)})


def test_nodes_that_lack_something_still_take_part(
    tmp_path: Path,
    federation: Federation,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """0 has all, 1 one class only, 2 no test images, 3 no images, 4 only test images."""
    node_folder(tmp_path / "full", PETS)
    node_folder(tmp_path / "one", {"cat": 12})
    write_tree(tmp_path / "untested" / "train", PETS)
    tested = write_tree(tmp_path / "untested" / "test", {"cat": 1}) / "cat" / "0.png"
    tested.write_bytes(b"no image")
    (tmp_path / "none").mkdir()
    write_tree(tmp_path / "only-test" / "test", PETS)
    names = ("full", "one", "untested", "none", "only-test")
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    with caplog.at_level("INFO", "flwr.pfedmoap"):
        run = federation([tmp_path / n for n in names], **{"data.classnames": "cat,red panda"})
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert "clients 3, 4: no training images, so no part in training" in said
    assert "clients 2, 3: no test images, so no accuracy" in said
    assert "client 1: training images of one class only" in said
    assert "client 2: broken images that were skipped" in said
    first, last = run.rounds()
    assert not first.failed | last.failed
    assert set(last.bytes_up) == {0, 1, 2}
    for record in (first, last):
        tested_clients = {c for c, m in record.clients.items() if "personal-accuracy" in m}
        assert tested_clients == {0, 1, 4}
    summary = json.loads((run.path / "summary.json").read_text())
    accuracies = [last.clients[c]["personal-accuracy"] for c in (0, 1, 4)]
    assert summary["personal_accuracy"] == pytest.approx(np.mean(accuracies))
    assert summary["worst_client_accuracy"] == min(accuracies)
    rows = (run.path / "clients.csv").read_text().splitlines()
    assert rows[4].split(",")[:5] == ["3", "", "0", "0", "0"]


def test_without_any_test_image_tables_say_so(
    tmp_path: Path, federation: Federation, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    write_tree(tmp_path / "a" / "train", PETS)
    write_tree(tmp_path / "a" / "test", {"cat": 1})
    (tmp_path / "a" / "test" / "cat" / "0.png").write_bytes(b"no image")
    run = federation([tmp_path / "a"])
    summary = json.loads((run.path / "summary.json").read_text())
    assert summary["personal_accuracy"] is summary["worst_client_accuracy"] is None
    tables.print_summary(summary, Console())
    tables.print_comparison({"pfedmoap": [summary]}, Console())
    assert "personal accuracy" in capsys.readouterr().out


def test_nobody_with_training_images_is_an_error(tmp_path: Path, federation: Federation) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(UsageError, match="no client has training images"):
        federation([tmp_path / "none"], **{"data.classnames": "cat,dog"})
