"""The data comes together once in a process: who holds what, and what is read of it."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from pfedmoap_flwr.clip.features import Reading, read_images
from pfedmoap_flwr.clip.settings import ClipSettings
from pfedmoap_flwr.data import SPLITS
from pfedmoap_flwr.data import federated as federated_module
from pfedmoap_flwr.data.federated import Federated, Task, federated, own_folder
from pfedmoap_flwr.data.images import load_images
from pfedmoap_flwr.data.partition import partition, whole
from pfedmoap_flwr.data.settings import DataSettings
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.training import node as node_module
from pfedmoap_flwr.training.node import Node, node_of
from support.copies import write_tree
from support.federation import forget_data
from support.tiny import NUM_CLIENTS

DATA = DataSettings(num_clients=NUM_CLIENTS, alpha=5.0)
CLIP = ClipSettings(model="tiny", pretrained="tiny")
PETS = {"cat": 20, "red_panda": 20}


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Nothing is known from other tests, nor to them."""
    forget_data()
    yield
    forget_data()


def a_node(reading: Reading = Reading(), **changes: Any) -> Node:  # noqa: B008 - it is frozen
    return node_of(CLIP.model_copy(update=changes), DATA, 0, "cpu", reading)


# Who holds what


def test_the_clients_are_those_of_the_partition() -> None:
    found = federated(DATA, 3)
    expected = partition(load_images("emoji-domains"), DATA, 3)
    assert list(found.clients) == [0, 1, 2, 3]
    for client_id, rows in found.clients.items():
        assert rows.client_id == client_id
        assert rows.domain == expected[client_id].domain
        for split in SPLITS:
            assert rows.rows[split].tolist() == expected[client_id].rows[split].tolist()


def test_the_sentence_is_the_settings_or_the_data_sets_own() -> None:
    images = load_images("emoji-domains")
    assert federated(DATA, 0).task == Task(images.classnames, "a drawing of {}.")
    other = DATA.model_copy(update={"template": "{}?"})
    assert federated(other, 0).task == Task(images.classnames, "{}?")


def test_a_folder_of_ones_own_is_all_its_clients(tmp_path: Path) -> None:
    data = DATA.model_copy(update={"shots": 5})
    folder = str(write_tree(tmp_path / "here", PETS))
    found = own_folder(data, folder, 3, 0)
    assert list(found.clients) == [3]
    expected = whole(found.images, data, 3, 0)
    assert {s: rows.tolist() for s, rows in found.clients[3].rows.items()} == {
        s: rows.tolist() for s, rows in expected.rows.items()
    }
    assert {s: len(rows) for s, rows in expected.rows.items()} == {
        "train": 10,
        "validation": 4,
        "test": 8,
    }
    assert found.task == Task(("cat", "red panda"), "a photo of a {}.")


def test_what_is_wrong_with_a_folder_names_its_client(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"client 3, data-dir=.*/absent: .* nothing at"):
        own_folder(DATA, str(tmp_path / "absent"), 3, 0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"client 3, data-dir=.*/empty: .* no images there"):
        node_of(CLIP, DATA, 0, "cpu", Reading(), str(tmp_path / "empty"), 3)


def test_an_impossible_partition_is_said_each_time() -> None:
    data = DATA.model_copy(update={"num_clients": 3})
    for _ in range(2):
        with pytest.raises(UsageError, match=r"data\.num-clients=3"):
            federated(data, 0)


# What is read


def test_a_split_is_a_clients_rows_of_what_is_read() -> None:
    node = a_node()
    for client_id, rows in node.federated.clients.items():
        for name in SPLITS:
            split = node.split(client_id, name)
            images = node.federated.images
            everything = read_images(node.clip, images.splits[name], Reading())
            assert torch.equal(split.features, everything[rows.rows[name]])
            assert split.labels.tolist() == images.column(name, "label")[rows.rows[name]].tolist()
            assert len(split) == len(rows.rows[name]) > 0


@pytest.mark.parametrize(
    ("reading", "train", "test"),
    [
        (Reading(), (64,), (64,)),
        (Reading("features", views=2), (2, 64), (64,)),
        (Reading("tokens"), (5, 64), (5, 64)),
        (Reading("pixels", views=3), (3, 3, 16, 16), (3, 16, 16)),
    ],
)
def test_every_reading_arrives_in_float32(
    reading: Reading, train: tuple[int, ...], test: tuple[int, ...]
) -> None:
    node = a_node(reading, features_dtype="float16")
    splits = {name: node.split(1, name) for name in ("train", "test")}
    shapes = {name: tuple(split.features.shape[1:]) for name, split in splits.items()}
    assert shapes == {"train": train, "test": test}
    assert {split.features.dtype for split in splits.values()} == {torch.float32}
    assert {split.labels.dtype for split in splits.values()} == {torch.int64}


def test_an_empty_split_has_no_images(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "here" / "train", PETS).parent
    write_tree(folder / "test", PETS)
    data = DATA.model_copy(update={"validation": 0.0})
    node = node_of(CLIP, data, 0, "cpu", Reading(), str(folder), 2)
    assert len(node.split(2, "validation")) == 0
    assert len(node.split(2, "train")) == 40


def test_what_a_client_does_to_its_split_reaches_nobody() -> None:
    node = a_node()
    before = node.split(0, "train").features.clone()
    node.split(0, "train").features.zero_()
    assert torch.equal(node.split(0, "train").features, before)


# Once


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is done of that which is to be done once: partitions drawn, splits read."""
    done: list[str] = []

    def drawn(images: Any, data: DataSettings, seed: int) -> Any:
        done.append(f"partition {seed}")
        return partition(images, data, seed)

    def read(clip: Any, images: Any, reading: Reading, dtype: Any, window: Any) -> Any:
        sizes = {96: "train", 32: "validation", 64: "test"}
        done.append(f"{reading.kind} of {sizes[len(images)]}")
        return read_images(clip, images, reading, dtype, window)

    monkeypatch.setattr(federated_module, "partition", drawn)
    monkeypatch.setattr(node_module, "read_images", read)
    return done


def test_only_the_split_asked_for_is_read_and_once(calls: list[str]) -> None:
    node = a_node()
    assert calls == ["partition 0"]
    for client_id in range(NUM_CLIENTS):
        node.split(client_id, "test")
    assert calls == ["partition 0", "features of test"]
    node.split(0, "train")
    assert calls == ["partition 0", "features of test", "features of train"]


def test_a_partition_is_drawn_once_whoever_asks(calls: list[str]) -> None:
    held: Federated = federated(DATA, 0)
    assert a_node().federated is held
    assert a_node(Reading("tokens")).federated is held
    assert a_node(features_dtype="float16").federated is held
    assert federated(DataSettings(num_clients=NUM_CLIENTS, alpha=5.0), 0) is held
    assert calls == ["partition 0"]
    federated(DATA, 1)
    assert calls == ["partition 0", "partition 1"]


def test_threads_that_begin_at_once_share_one_node(calls: list[str]) -> None:
    together = threading.Barrier(8)

    def begin(client_id: int) -> Node:
        together.wait()
        node = a_node()
        node.split(client_id % NUM_CLIENTS, "train")
        return node

    with ThreadPoolExecutor(8) as pool:
        nodes = list(pool.map(begin, range(8)))
    assert len(set(map(id, nodes))) == 1
    assert calls == ["partition 0", "features of train"]


def test_two_readings_of_one_data_set_are_alive_at_once(calls: list[str]) -> None:
    tokens = a_node(Reading("tokens"))
    features = tokens.reading_as(Reading())
    assert tokens.reading_as(Reading("tokens")) is tokens
    assert tokens.reading_as(Reading()) is features
    assert features.federated is tokens.federated
    assert torch.equal(features.split(0, "test").features, tokens.split(0, "test").features[:, 0])
    features.split(1, "test")
    assert calls == ["partition 0", "features of test", "tokens of test"]


def test_nodes_with_folders_are_told_apart_by_client_and_folder(tmp_path: Path) -> None:
    folders = [str(write_tree(tmp_path / name, PETS)) for name in "ab"]
    arguments = (CLIP, DATA, 0, "cpu", Reading())
    first = node_of(*arguments, folders[0], 0)
    assert node_of(*arguments, folders[0], 0) is first
    assert node_of(*arguments, folders[1], 1) is not first
    assert list(node_of(*arguments, folders[1], 1).federated.clients) == [1]
    with pytest.raises(ValueError, match="say whose"):
        node_of(*arguments, folders[0])


def test_without_a_folder_all_clients_share_a_node() -> None:
    assert node_of(CLIP, DATA, 0, "cpu", Reading(), "", 2) is a_node()
