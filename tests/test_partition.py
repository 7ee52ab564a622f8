"""Partitions: nothing lost, nothing held twice, one distribution in all splits of a client."""

from dataclasses import replace

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pfedmoap_flwr.data.images import SPLITS, ImageData, load_images
from pfedmoap_flwr.data.partition import MIN_TEST, MIN_TRAIN, ClientRows, DataSettings, partition
from pfedmoap_flwr.errors import UsageError

PARTITIONS = ["dirichlet-domain", "pathological"]


def many_images(classes: int = 8, domains: int = 3) -> ImageData:
    """A data set of numbers only: 60, 20 and 20 images per class and domain."""
    splits = {}
    for split, count in zip(SPLITS, (60, 20, 20), strict=True):
        label, domain = np.meshgrid(np.arange(classes), np.arange(domains))
        rows = {
            "label": np.repeat(label.ravel(), count).tolist(),
            "domain": np.repeat(domain.ravel(), count).tolist(),
        }
        splits[split] = datasets.Dataset.from_dict(rows)
    names = tuple(map(str, range(classes)))
    return ImageData("numbers", names, names[:domains], "a {}.", splits)


IMAGES = many_images()
thoroughly = hypothesis_settings(deadline=None, max_examples=30)
settings = st.builds(
    DataSettings,
    partition=st.sampled_from(PARTITIONS),
    num_clients=st.sampled_from([3, 6]),
    alpha=st.sampled_from([0.3, 1.0, 100.0]),
)


@thoroughly
@given(data=settings, seed=st.integers(0, 10**6))
def test_each_image_lies_with_one_client(data: DataSettings, seed: int) -> None:
    clients = partition(IMAGES, data, seed)
    assert [c.client for c in clients] == list(range(data.num_clients))
    for split in SPLITS:
        held = np.concatenate([c.rows[split] for c in clients])
        assert sorted(held.tolist()) == list(range(len(IMAGES.splits[split])))


@thoroughly
@given(data=settings, seed=st.integers(0, 10**6))
def test_every_client_can_train_and_be_tested(data: DataSettings, seed: int) -> None:
    for client in partition(IMAGES, data, seed):
        assert len(client.rows["train"]) >= MIN_TRAIN
        assert len(client.rows["test"]) >= MIN_TEST


@thoroughly
@given(data=settings, seed=st.integers(0, 10**6))
def test_train_and_test_of_a_client_follow_one_distribution(data: DataSettings, seed: int) -> None:
    for client in partition(IMAGES, data, seed):
        shares = []
        for split in SPLITS:
            labels = IMAGES.column(split, "label")[client.rows[split]]
            counts = np.bincount(labels, minlength=8)
            # cutting whole images moves each class by at most one image
            shares.append((counts, len(IMAGES.splits[split]) / (8 * 3)))
        for counts, per_cell in shares[1:]:
            train_counts, train_per_cell = shares[0]
            domains = 1 if client.domain else 3
            difference = train_counts / train_per_cell - counts / per_cell
            assert np.abs(difference).max() <= domains * (1 / train_per_cell + 1 / per_cell)


@thoroughly
@given(data=settings, seed=st.integers(0, 10**6))
def test_the_seed_decides(data: DataSettings, seed: int) -> None:
    def rows(seed: int) -> list[list[int]]:
        return [c.rows["train"].tolist() for c in partition(IMAGES, data, seed)]

    assert rows(seed) == rows(seed)
    if data.partition == "dirichlet-domain" and data.num_clients == 6:
        assert rows(seed) != rows(seed + 1)


def test_a_dirichlet_client_has_one_domain() -> None:
    clients = partition(IMAGES, DataSettings(num_clients=6), 0)
    assert [c.domain for c in clients] == ["0", "0", "1", "1", "2", "2"]
    for client in clients:
        for split in SPLITS:
            domains = IMAGES.column(split, "domain")[client.rows[split]]
            assert {str(d) for d in domains.tolist()} == {client.domain}


def test_a_small_alpha_is_more_skewed() -> None:
    def skew(alpha: float) -> float:
        clients = partition(IMAGES, DataSettings(num_clients=6, alpha=alpha), 0)
        return float(np.mean([_largest_share(c) for c in clients]))

    assert skew(0.3) > 1.3 * skew(100.0)


def _largest_share(client: ClientRows) -> float:
    counts = np.bincount(IMAGES.column("train", "label")[client.rows["train"]])
    return float(counts.max() / counts.sum())


def test_pathological_clients_share_no_class() -> None:
    clients = partition(IMAGES, DataSettings(partition="pathological", num_clients=3), 0)
    classes = [set(IMAGES.column("train", "label")[c.rows["train"]].tolist()) for c in clients]
    assert sorted(len(c) for c in classes) == [2, 3, 3]
    assert set.union(*classes) == set(range(8))
    for client, held in zip(clients, classes, strict=True):
        assert set(IMAGES.column("test", "label")[client.rows["test"]].tolist()) == held


@pytest.mark.parametrize("name", PARTITIONS)
def test_few_shot_keeps_so_many_of_each_class_for_training_alone(name: str) -> None:
    whole = DataSettings(partition=name, num_clients=3)  # type: ignore[arg-type]
    for before, after in zip(
        partition(IMAGES, whole, 0), partition(IMAGES, replace(whole, shots=4), 0), strict=True
    ):
        assert set(after.rows["train"]) <= set(before.rows["train"])
        full = np.bincount(IMAGES.column("train", "label")[before.rows["train"]], minlength=8)
        kept = np.bincount(IMAGES.column("train", "label")[after.rows["train"]], minlength=8)
        assert kept.tolist() == np.minimum(full, 4).tolist()
        assert after.rows["test"].tolist() == before.rows["test"].tolist()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (DataSettings(num_clients=4), ["data.num-clients=4", "multiple of the 3 domains"]),
        (DataSettings(num_clients=150, alpha=0.01), ["data.alpha=0.01", "larger alpha"]),
        (
            DataSettings(partition="pathological", num_clients=9),
            ["data.num-clients=9", "numbers has 8"],
        ),
    ],
)
def test_an_impossible_partition_is_named(data: DataSettings, words: list[str]) -> None:
    with pytest.raises(UsageError) as raised:
        partition(IMAGES, data, 0)
    assert all(word in str(raised.value) for word in words)


def test_an_unknown_data_set_is_named() -> None:
    with pytest.raises(UsageError, match=r"data\.name='mnist'"):
        load_images("mnist")
