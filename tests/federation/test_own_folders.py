"""Nodes that each have a folder of images, in one federation."""

import json
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from pfedmoap_flwr.data import SPLITS
from pfedmoap_flwr.engines.in_process import (
    FIRST_NODE_ID,
    InProcessGrid,
    identify,
)
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.federation import client
from pfedmoap_flwr.report import render, tables
from pfedmoap_flwr.report.build import Wishes, build
from pfedmoap_flwr.report.collect import collect
from support.copies import write_tree
from support.federation import Federation, own_context
from support.tiny import TINY

PETS = {"cat": 20, "red_panda": 20}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def query(folder: Path, **flat: Any) -> dict[str, Any]:
    """Return the card of client 3 that has its own folder."""
    identify()
    content = RecordDict({"config": ConfigRecord({"run": "0" * 32})})
    message = Message(content, FIRST_NODE_ID + 3, "query")
    opened = client.open_client(message, own_context(3, folder, {**TINY, **flat}))
    return dict(client.query(opened, message)["card"])


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
    shared = lists / "classes.txt"
    shutil.copy(lists / "0.txt", shared)

    class TwoMachines(InProcessGrid):
        """A path may hold another file on another machine."""

        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            ids: list[str] = []
            for number, message in enumerate(messages):
                shutil.copy(lists / f"{number}.txt", shared)
                ids += super().push_messages([message])
            return ids

    with pytest.raises(UsageError, match="another order, number 1 is 'yak' instead of 'red pan"):
        federation(dirs, TwoMachines, **{"data.classnames": str(shared)})


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
    render.print_report(build(collect([run.path]), Wishes()), Console())
    assert "personal accuracy" in capsys.readouterr().out


def test_nobody_with_training_images_is_an_error(tmp_path: Path, federation: Federation) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(UsageError, match="no client has training images"):
        federation([tmp_path / "none"], **{"data.classnames": "cat,dog"})
