"""What is promised of every partition, found by name, on even and on any other data."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pfedmoap_flwr import config
from pfedmoap_flwr.data import SPLITS
from pfedmoap_flwr.data.images import ImageData, load_images
from pfedmoap_flwr.data.partition import (
    MIN_TEST,
    ClientRows,
    class_counts,
    partition,
)
from pfedmoap_flwr.data.partitioners import CUTS, evenly, nearest
from pfedmoap_flwr.data.settings import DataSettings
from pfedmoap_flwr.errors import UsageError
from support.tables import even_table, table

PARTITIONS = list(CUTS)
BY_DOMAIN = {"dirichlet-domain", "natural"}  # whose shares are those of a class within a domain
IMAGES = even_table()
thoroughly = hypothesis_settings(deadline=None, max_examples=30)
every_partition = pytest.mark.parametrize("name", PARTITIONS)
alphas = st.sampled_from([0.3, 1.0, 100.0])


def settings_of(name: str, **changes: Any) -> DataSettings:
    return DataSettings(**{"partition": name, "num_clients": 3, **changes})


Case = tuple[ImageData, DataSettings]


def cases(name: str) -> st.SearchStrategy[Case]:
    """Any small table, unbalanced, with holes, and settings for it, possible or not."""

    @st.composite
    def case(draw: Callable[..., Any]) -> Case:
        domains, classes = draw(st.integers(1, 3)), draw(st.integers(1, 6))
        counts = {}
        for split, most in zip(SPLITS, (40, 6, 15), strict=True):
            cell = st.lists(st.integers(0, most), min_size=classes, max_size=classes)
            rows = draw(st.lists(cell, min_size=domains, max_size=domains))
            counts[split] = np.array(rows)
        clients = draw(st.integers(1, 12))
        if name == "dirichlet-domain":
            clients = domains * draw(st.integers(1, 4))
        if name == "natural":
            clients = domains
        settings = DataSettings(
            partition=name,
            num_clients=clients,
            min_examples=draw(st.integers(1, 5)),
            alpha=draw(alphas),
            fine_alpha=draw(alphas),
            shards_per_client=draw(st.integers(1, 3)),
        )
        return table(counts), settings

    return case()


def cells(images: ImageData, data: DataSettings, split: str) -> np.ndarray:
    """The number of each image's cell: all images of a cell have the same shares."""
    label = images.column(split, "label")
    if data.partition not in BY_DOMAIN:
        return label
    return images.column(split, "domain") * len(images.classnames) + label


def assert_each_image_on_one_client(images: ImageData, clients: list[ClientRows]) -> None:
    for split in SPLITS:
        held = np.concatenate([c.rows[split] for c in clients])
        assert sorted(held.tolist()) == list(range(len(images.splits[split])))


def assert_enough(data: DataSettings, clients: list[ClientRows]) -> None:
    assert [c.client_id for c in clients] == list(range(data.num_clients))
    for client in clients:
        assert len(client.rows["train"]) >= data.min_examples
        assert len(client.rows["test"]) >= MIN_TEST


def assert_one_distribution(
    images: ImageData, data: DataSettings, clients: list[ClientRows]
) -> None:
    """A client's part of a cell is its share of it, to within one image, in every split."""
    of = {split: cells(images, data, split) for split in SPLITS}
    count = 1 + max(int(numbers.max(initial=0)) for numbers in of.values())
    whole = {split: np.bincount(of[split], minlength=count) for split in SPLITS}
    for client in clients:
        part = {s: np.bincount(of[s][client.rows[s]], minlength=count) for s in SPLITS}
        for split in ("validation", "test"):
            both = (whole["train"] > 0) & (whole[split] > 0)
            train, other = whole["train"][both], whole[split][both]
            off = np.abs(part["train"][both] / train - part[split][both] / other)
            assert (off <= 1 / train + 1 / other + 1e-9).all()


@pytest.mark.slow
@every_partition
@thoroughly
@given(draw=st.data(), seed=st.integers(0, 10**6))
def test_the_promises_hold_on_any_data_or_it_is_said_what_to_change(
    name: str, draw: st.DataObject, seed: int
) -> None:
    images, data = draw.draw(cases(name))
    refusal = ""
    try:
        clients = partition(images, data, seed)
    except UsageError as error:
        refusal = str(error)
    if refusal:
        event("refused")
        assert refusal.startswith("setting data.")
        assert "data.min-examples=" in refusal or "data.num-clients=" in refusal
        return
    event("made")
    assert_each_image_on_one_client(images, clients)
    assert_enough(data, clients)
    assert_one_distribution(images, data, clients)


@every_partition
@hypothesis_settings(deadline=None, max_examples=10)
@given(alpha=alphas, shards=st.integers(1, 4), seed=st.integers(0, 10**6))
def test_the_promises_hold_on_even_data(name: str, alpha: float, shards: int, seed: int) -> None:
    data = settings_of(name, alpha=alpha, shards_per_client=shards)
    clients = partition(IMAGES, data, seed)
    assert_each_image_on_one_client(IMAGES, clients)
    assert_enough(data, clients)
    assert_one_distribution(IMAGES, data, clients)


@every_partition
def test_the_seed_decides(name: str) -> None:
    def rows(seed: int) -> list[list[int]]:
        data = settings_of(name, num_clients=3 if name == "natural" else 6)
        return [c.rows["train"].tolist() for c in partition(IMAGES, data, seed)]

    assert rows(3) == rows(3)
    if name != "natural":
        assert rows(3) != rows(4)


@every_partition
def test_a_client_has_as_many_examples_as_asked_for(name: str) -> None:
    data = settings_of(name, alpha=100.0, min_examples=350)
    assert_enough(data, partition(IMAGES, data, 0))
    with pytest.raises(UsageError, match=r"lower data\.min-examples=481"):
        partition(IMAGES, data.model_copy(update={"min_examples": 481}), 0)


@every_partition
def test_few_shot_keeps_so_many_of_each_class_for_training_alone(name: str) -> None:
    before, kept = partition(IMAGES, settings_of(name), 0), {}
    full = class_counts(IMAGES, before, "train")
    for shots in (1, 2, 4, 8, 16):
        kept[shots] = partition(IMAGES, settings_of(name, shots=shots), 0)
        assert (class_counts(IMAGES, kept[shots], "train") == np.minimum(full, shots)).all()
        for client, whole in zip(kept[shots], before, strict=True):
            assert client.domain == whole.domain
            assert client.rows["test"].tolist() == whole.rows["test"].tolist()
    for fewer, more in ((1, 2), (2, 4), (4, 8), (8, 16)):
        for client, larger in zip(kept[fewer], kept[more], strict=True):
            assert set(client.rows["train"]) <= set(larger.rows["train"])


def test_class_counts_are_clients_by_classes() -> None:
    clients = partition(IMAGES, DataSettings(num_clients=6), 0)
    counts = class_counts(IMAGES, clients, "test")
    assert counts.shape == (6, 8)
    assert counts.sum(axis=0).tolist() == [60] * 8
    for client, row in zip(clients, counts, strict=True):
        labels = IMAGES.column("test", "label")[client.rows["test"]].tolist()
        assert [labels.count(c) for c in range(8)] == row.tolist()


@pytest.mark.parametrize("whole", [nearest, evenly])
@thoroughly
@given(draw=st.data())
def test_whole_numbers_are_less_than_one_image_off(whole: Any, draw: st.DataObject) -> None:
    classes, clients = draw.draw(st.integers(1, 6)), draw.draw(st.integers(1, 9))
    rng = np.random.default_rng(draw.draw(st.integers(0, 10**6)))
    shares = rng.dirichlet([draw.draw(alphas)] * clients, size=classes)
    sizes = rng.integers(0, 30, classes)
    counts = whole(shares, sizes)
    assert counts.sum(axis=1).tolist() == sizes.tolist()
    assert (counts >= 0).all()
    assert (np.abs(counts - shares * sizes[:, None]) <= 1 + 1e-9).all()


# Each in its own way


@thoroughly
@given(draw=st.data())
def test_iid_clients_are_alike_to_within_an_image(draw: st.DataObject) -> None:
    images, data = draw.draw(cases("iid"))
    data = data.model_copy(update={"min_examples": 1})
    many = all(len(images.splits[s]) >= MIN_TEST * data.num_clients for s in ("train", "test"))
    if not many:
        return
    clients = partition(images, data, 0)
    for split in SPLITS:
        counts = class_counts(images, clients, split)
        assert np.ptp(counts, axis=0).max() <= 1
        assert np.ptp(counts.sum(axis=1)) <= 1


def test_a_dirichlet_domain_client_has_one_domain() -> None:
    clients = partition(IMAGES, DataSettings(num_clients=6), 0)
    assert [c.domain for c in clients] == ["0", "0", "1", "1", "2", "2"]
    for client in clients:
        for split in SPLITS:
            domains = IMAGES.column(split, "domain")[client.rows[split]]
            assert {str(d) for d in domains.tolist()} == {client.domain}


@pytest.mark.parametrize("name", ["dirichlet", "dirichlet-domain", "pachinko"])
def test_a_small_alpha_is_more_skewed(name: str) -> None:
    def skew(alpha: float) -> float:
        data = settings_of(name, num_clients=6, alpha=alpha)
        counts = class_counts(IMAGES, partition(IMAGES, data, 0), "train")
        return float((counts.max(axis=1) / counts.sum(axis=1)).mean())

    assert skew(0.3) > 1.3 * skew(100.0)


def test_a_dirichlet_that_divides_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    domains = len(IMAGES.domains)
    partition(IMAGES, settings_of("dirichlet-domain", num_clients=2 * domains), 0)
    assert not caplog.messages
    partition(IMAGES, settings_of("dirichlet-domain", num_clients=domains, alpha=0.3), 0)
    [said] = caplog.messages
    assert "data.alpha=0.3 divides nothing" in said


def test_dirichlet_of_one_domain_is_dirichlet_domain() -> None:
    images = even_table(domains=1)
    one, other = (partition(images, settings_of(n), 5) for n in ("dirichlet", "dirichlet-domain"))
    assert [c.domain for c in one] == ["0"] * 3
    for split in SPLITS:
        for a, b in zip(one, other, strict=True):
            assert a.rows[split].tolist() == b.rows[split].tolist()


def test_pathological_clients_share_no_class() -> None:
    clients = partition(IMAGES, settings_of("pathological"), 0)
    held = class_counts(IMAGES, clients, "train") > 0
    assert sorted(held.sum(axis=1).tolist()) == [2, 3, 3]
    assert held.sum(axis=0).tolist() == [1] * 8
    assert ((class_counts(IMAGES, clients, "test") > 0) == held).all()


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_shards_hold_few_classes_and_as_many_images_each(shards: int) -> None:
    data = settings_of("shards", num_clients=8, shards_per_client=shards)
    counts = class_counts(IMAGES, partition(IMAGES, data, 0), "train")
    # Eight classes of equal size: a shard lies within one
    assert (counts > 0).sum(axis=1).max() <= shards
    assert counts.sum(axis=1).tolist() == [180] * 8


def test_a_shard_goes_over_the_border_between_two_classes() -> None:
    counts = {"train": np.array([[30, 90]]), "validation": np.array([[1, 3]])}
    images = table({**counts, "test": np.array([[20, 20]])})
    data = settings_of("shards", num_clients=2, shards_per_client=1)
    clients = partition(images, data, 0)
    train = class_counts(images, clients, "train").tolist()
    # A third of the second class lies in the first shard, in training as in test
    assert sorted(train) == [[0, 60], [30, 30]]
    test = class_counts(images, clients, "test").tolist()
    assert sorted(test) in ([[0, 13], [20, 7]], [[0, 14], [20, 6]])


def test_a_natural_client_is_a_value_of_the_column() -> None:
    assert [c.domain for c in partition(IMAGES, settings_of("natural"), 0)] == ["0", "1", "2"]
    clients = partition(IMAGES, settings_of("natural", id_column="writer"), 0)
    for client, writer in zip(clients, ("ann", "bob", "eve"), strict=True):
        assert client.domain == ""
        for split in SPLITS:
            assert set(IMAGES.splits[split][client.rows[split]]["writer"]) == {writer}


def test_pachinko_clients_prefer_whole_coarse_classes() -> None:
    data = settings_of("pachinko", num_clients=6, alpha=0.1, fine_alpha=1000.0)
    counts = class_counts(IMAGES, partition(IMAGES, data, 0), "train")
    first, second = counts[0, 0::2], counts[0, 1::2]
    held = first + second > 40
    assert 1 <= held.sum() < 4
    # Both fine classes of a coarse one alike
    assert (np.abs(first - second)[held] < 0.5 * (first + second)[held]).all()


def test_pachinko_clients_have_as_many_images_each() -> None:
    data = settings_of("pachinko", num_clients=7, alpha=0.05)
    clients = partition(IMAGES, data, 0)
    sizes = [sum(len(c.rows[s]) for s in SPLITS) for c in clients]
    # 2,400 images by 7; each class is cut in three splits, each to within one image
    assert max(abs(size - 2400 / 7) for size in sizes) <= 3 * 8


def test_pachinko_goes_on_where_nothing_that_a_client_likes_is_left() -> None:
    images = table({s: np.array([[n, n, n, n]]) for s, n in zip(SPLITS, (40, 4, 12), strict=True)})
    data = settings_of("pachinko", num_clients=4, alpha=1e-4, fine_alpha=1e-4)
    assert_each_image_on_one_client(images, partition(images, data, 0))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_clients": 4}, ["data.num-clients=4", "multiple of the 3 domains"]),
        ({"num_clients": 30, "alpha": 0.01}, ["domain 0", "of 1000", "change data.alpha=0.01"]),
        ({"num_clients": 150}, ["lower data.num-clients=150", "480 and 160"]),
        ({"partition": "iid", "num_clients": 500}, ["lower data.num-clients=500"]),
        ({"partition": "pathological", "num_clients": 9}, ["clients=9", "numbers has 8"]),
        ({"partition": "natural"}, ["set data.num-clients=3"]),
        ({"partition": "natural", "id_column": "x"}, ["data.id-column='x'", "writer"]),
        ({"partition": "pachinko", "coarse_column": "x"}, ["data.coarse-column='x'", "it has"]),
        ({"partition": "pachinko", "coarse_column": "writer"}, ["'writer'", "more than one"]),
    ],
)
def test_an_impossible_partition_is_named(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UsageError) as raised:
        partition(IMAGES, DataSettings(**changes), 0)
    assert all(word in str(raised.value) for word in words), raised.value


def test_an_unknown_partition_is_named_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"data\.partition='shard'.*'shards'"):
        config.parse({"data.partition": "shard"})
    assert set(PARTITIONS) <= set(config.known_keys()["data.partition"].split(": ")[1].split(" | "))


def test_what_a_partition_reads_is_a_setting() -> None:
    known = set(DataSettings.model_fields)
    for function in CUTS.values():
        images, clients, *own = inspect.signature(function).parameters.values()
        assert (images.name, clients.name) == ("images", "clients")
        assert {p.name for p in own} <= known
        assert {p.kind for p in own} <= {inspect.Parameter.KEYWORD_ONLY}


def test_an_unknown_data_set_is_named() -> None:
    with pytest.raises(UsageError, match=r"data\.name='mnist'"):
        load_images("mnist")
