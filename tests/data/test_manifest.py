"""The manifest: a function of settings and seed, the same for ever; in the run folder."""

import hashlib
import json
from typing import Any

import numpy as np
import pytest

from pfedmoap_flwr import config
from pfedmoap_flwr.data import SPLITS
from pfedmoap_flwr.data.federated import Federated, federated
from pfedmoap_flwr.data.images import ImageData, load_anew, load_images
from pfedmoap_flwr.data.partition import (
    ClientRows,
    class_counts,
    digest,
    manifest,
    partition,
)
from pfedmoap_flwr.data.partitioners import CUTS
from pfedmoap_flwr.data.settings import DataSettings, ImageSettings
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.federation import server
from pfedmoap_flwr.training import node
from support.federation import Federate, forget_data
from support.tables import even_table
from support.tiny import TINY

IMAGES = even_table()
# Whoever changes one of these changes everybody's results
GOLDEN = {
    "iid": "b9f82bd33a19208d6e3f83796de465623e536eb47deb68ea59249395c1c23f1a",
    "pathological": "7142ad90b858b3a37ef0d10f90b4176cce3f43cbd647fae684d3a44a9d6d504c",
    "dirichlet": "6ae10767b1f7ef80b9e969c806051d30005840ec00247a68a5496629de1f9578",
    "dirichlet-domain": "0ae94283b689bca039f5dd85737879b249e0001ad8cd21f3b80c52d1aa4954c5",
    "shards": "2fec524288e2c580c90f576d11828ea8a235694c86eba0e367de4d373ab7719b",
    "natural": "96a239ca8f4ef6460576bcdf21859e10516e2443501c030fa9b2829827325303",
    "pachinko": "edfb9b4d227aa1909a7a7d75e79116d38bd433af5e6808a5bfb59f913040cf7e",
}
# Of the published results; computed before there were other partitions
PUBLISHED = {
    0: "c53b0dc03e9a9573b25c5a27ab5b8b5332c19298b2767cfd9610f7df967e252f",
    1: "f8730395143f0458f298ba24410b76b6cec8d9fb4d51288da6964c3b4d728b34",
    2: "e70f034dad148baf5245271e895fa0b09469a6107a8408ea20d6aa569281d4d6",
}
PUBLISHED_FOUR_SHOTS = {
    0: "71f8ba90414b8e5e7ea976a18215d9895d5f47f20ef5108c0fb3cd4e4556a4fc",
    1: "e6a6c75b18ef4f7b1156c0fa106eadc1725ad7d1d323e928cd106d988ce336b5",
    2: "40cabb72e5bf4ea6b9ea465d21d5576fcaa631905617b9660249d0c32036fb73",
}


@pytest.fixture
def emoji(monkeypatch: pytest.MonkeyPatch) -> ImageData:
    """The real emoji-domains, not the tests'."""
    monkeypatch.delenv("PFEDMOAP_ASSETS")
    return load_anew(ImageSettings())


def digest_of_rows(clients: list[ClientRows]) -> str:
    rows = [[c.client_id, c.domain, {s: c.rows[s].tolist() for s in SPLITS}] for c in clients]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


@pytest.mark.parametrize("seed", PUBLISHED)
def test_the_partition_of_the_published_results_stays(seed: int, emoji: ImageData) -> None:
    assert digest_of_rows(partition(emoji, DataSettings(), seed)) == PUBLISHED[seed]
    few = partition(emoji, DataSettings(shots=4), seed)
    assert digest_of_rows(few) == PUBLISHED_FOUR_SHOTS[seed]


@pytest.mark.parametrize("name", CUTS)
def test_a_seed_gives_this_manifest_and_no_other(name: str) -> None:
    data = DataSettings(partition=name, num_clients=3, shots=16)
    said = manifest(IMAGES, data, 7, partition(IMAGES, data, 7))
    assert said["sha256"] == GOLDEN[name]


@pytest.mark.parametrize("name", CUTS)
def test_a_manifest_says_all_there_is(name: str) -> None:
    data = DataSettings(partition=name, num_clients=3)
    clients = partition(IMAGES, data, 0)
    said = json.loads(json.dumps(manifest(IMAGES, data, 0, clients)))
    assert said["images"] == {"train": 1440, "validation": 480, "test": 480}
    for one, other in zip(said["clients"], clients, strict=True):
        assert (one["client"], one["domain"]) == (other.client_id, other.domain)
        assert one["rows"] == {s: other.rows[s].tolist() for s in SPLITS}
    for split in SPLITS:
        counts = np.array([one["classes"][split] for one in said["clients"]])
        assert (counts == class_counts(IMAGES, clients, split)).all()
    assert said["sha256"] == digest(said)
    said["clients"][0]["rows"]["test"][0] += 1
    assert said["sha256"] != digest(said)


def test_a_manifest_has_the_settings_that_matter_and_no_others() -> None:
    def sha256(**changes: Any) -> str:
        data = DataSettings(partition="iid", num_clients=3)
        said = manifest(IMAGES, data.model_copy(update=changes), 0, partition(IMAGES, data, 0))
        return str(said["sha256"])

    assert sha256(alpha=5.0) == sha256(template="{}") == sha256()
    assert sha256(num_clients=4) != sha256()
    data = DataSettings(partition="pachinko", num_clients=3)
    settings = manifest(IMAGES, data, 5, partition(IMAGES, data, 5))["settings"]
    assert settings == {
        "data.name": "emoji-domains",
        "data.partition": "pachinko",
        "data.num-clients": 3,
        "data.min-examples": 10,
        "data.shots": 0,
        "data.alpha": 0.3,
        "data.fine-alpha": 10.0,
        "data.coarse-column": "coarse_label",
        "seed": 5,
    }
    assert settings.keys() - {"seed"} <= config.known_keys().keys()


# In the run folder


def test_a_run_leaves_its_manifest(federate: Federate) -> None:
    run = federate(method="zeroshot", num_server_rounds=1, seed=3)
    saved = json.loads((run.path / "partition.json").read_text())
    images, data = load_images("emoji-domains"), config.parse(TINY).data
    assert saved == manifest(images, data, 3, partition(images, data, 3))


def without_data(data: DataSettings, seed: int) -> Federated:
    raise UsageError("no images here")


def test_a_server_without_the_data_leaves_none(
    federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "federated", without_data)
    run = federate(method="zeroshot", num_server_rounds=1)
    assert (run.path / "summary.json").exists()
    assert not (run.path / "partition.json").exists()


def test_nodes_with_other_images_than_the_server_have_none(
    federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(data: DataSettings, seed: int) -> Federated:
        return federated(data, seed + 1)

    forget_data()
    monkeypatch.setattr(node, "federated", other)
    run = federate(method="zeroshot", num_server_rounds=1)
    forget_data()
    assert (run.path / "summary.json").exists()
    assert not (run.path / "partition.json").exists()
