"""Image, label and domain belong together: read from the pixels, after partition and features.

And the splits of a data set share no image, or it says so.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from pfedmoap_flwr.clip.features import Reading
from pfedmoap_flwr.clip.load import FrozenClip
from pfedmoap_flwr.clip.settings import ClipSettings
from pfedmoap_flwr.data import SPLITS, federated
from pfedmoap_flwr.data.images import ImageData, duplicates, load_anew
from pfedmoap_flwr.data.partition import ClientRows, partition
from pfedmoap_flwr.data.partitioners import CUTS
from pfedmoap_flwr.data.settings import DataSettings, ImageSettings
from pfedmoap_flwr.training.node import node_of
from support.federation import forget_data

CLIP = ClipSettings(model="tiny", pretrained="tiny")
CLASSES, DOMAINS = 6, 3
COUNTS = {"train": 40, "validation": 4, "test": 10}  # of a class in a domain
FIRST = {"train": 0, "validation": 2000, "test": 4000}  # number of a split's first image


def picture(label: int, domain: int, number: int) -> Image.Image:
    """Label, domain and number of an image as its colour."""
    colour = (label * 40 + domain, number // 256, number % 256)
    return Image.new("RGB", (4, 4), colour)


def read(colours: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Label, domain and number from colours (n, 3)."""
    red, high, low = colours.astype(int).T
    return red // 40, red % 40, high * 256 + low


@pytest.fixture(scope="module")
def images() -> ImageData:
    """Pictures that say what they are, in a random order."""
    splits = {}
    features = datasets.Features(
        {"image": datasets.Image(), **{k: datasets.Value("int64") for k in ("label", "domain")}}
        | {"coarse_label": datasets.Value("int64")}
    )
    for split, count in COUNTS.items():
        cells = np.random.default_rng(1).permutation(np.repeat(np.arange(CLASSES * DOMAINS), count))
        label, domain = cells % CLASSES, cells // CLASSES
        numbers = FIRST[split] + np.arange(len(cells))
        columns = {
            "image": [picture(int(c), int(d), int(n)) for c, d, n in zip(label, domain, numbers)],  # noqa: B905
            "label": label.tolist(),
            "domain": domain.tolist(),
            "coarse_label": (label // 2).tolist(),
        }
        splits[split] = datasets.Dataset.from_dict(columns, features=features)
    names = tuple(map(str, range(CLASSES)))
    return ImageData("colours", names, names[:DOMAINS], "a {}.", splits)


class Colours(nn.Module):
    """An image tower that sees nothing but the colour: (B, 3, H, W) -> (B, 256 + 256 + 256)."""

    def forward(self, pixels: Tensor) -> Tensor:
        one_hot = F.one_hot(pixels[:, :, 0, 0].long(), 256)
        return one_hot.flatten(1).float()


@pytest.fixture
def seeing_colours(
    images: ImageData, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[None]:
    """Let clients load the pictures, and a CLIP whose features say the colour."""

    def preprocess(image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    monkeypatch.setenv("PFEDMOAP_CACHE", str(tmp_path))
    monkeypatch.setattr(federated, "load_images", lambda settings: images)
    monkeypatch.setattr(FrozenClip, "preprocess", property(lambda clip: preprocess))
    monkeypatch.setattr(FrozenClip, "image_tower", lambda clip: contextlib.nullcontext(Colours()))
    forget_data()
    yield
    forget_data()


def colours(features: Tensor) -> np.ndarray:
    """Back from features (n, 768) to colours (n, 3)."""
    return features.unflatten(1, (3, 256)).argmax(dim=2).numpy()


def settings_of(name: str, **changes: Any) -> DataSettings:
    return DataSettings(partition=name, num_clients=3, **changes)


@pytest.mark.parametrize("shots", [0, 4])
@pytest.mark.parametrize("name", CUTS)
@pytest.mark.usefixtures("seeing_colours")
def test_what_a_client_trains_on_is_what_its_pixels_say(
    name: str, shots: int, images: ImageData
) -> None:
    data = settings_of(name, shots=shots)
    node = node_of(CLIP, data, 0, "cpu", Reading())
    for rows in partition(images, data, 0):
        splits = {split: node.split(rows.client_id, split) for split in SPLITS}
        for split in SPLITS:
            label, domain, number = read(colours(splits[split].features))
            assert label.tolist() == splits[split].labels.tolist()
            assert domain.tolist() == images.column(split, "domain")[rows.rows[split]].tolist()
            assert (number - FIRST[split]).tolist() == rows.rows[split].tolist()
            if rows.domain:
                assert set(domain.tolist()) == {int(rows.domain)}


@pytest.mark.usefixtures("seeing_colours")
def test_augmented_views_stay_with_their_labels(images: ImageData) -> None:
    data = settings_of("dirichlet-domain")
    node = node_of(CLIP, data, 0, "cpu", Reading(views=2))
    for rows in partition(images, data, 0):
        train = node.split(rows.client_id, "train")
        for view in range(2):
            label, _, number = read(colours(train.features[:, view]))
            assert label.tolist() == train.labels.tolist()
            assert number.tolist() == rows.rows["train"].tolist()


@dataclass(frozen=True)
class Pair:
    """An image's number in the data set and the label it is trained with."""

    image: int
    label: int


def ours(images: ImageData, split: str, held: ClientRows) -> list[Pair]:
    labels = images.column(split, "label")
    return [Pair(row, int(labels[row])) for row in held.rows[split].tolist()]


def as_released(images: ImageData, split: str, held: ClientRows) -> list[Pair]:
    """What pFedMoAP's released code makes of a client of a domain.

    It takes the labels of the client's rows, but goes through the files of the whole domain from
    the first: the i-th label meets the i-th file.
    """
    files = np.flatnonzero(images.column(split, "domain") == images.domains.index(held.domain))
    labels = images.column(split, "label")[held.rows[split]]
    return [Pair(int(f), int(y)) for f, y in zip(files, labels)]  # noqa: B905 - as it does


def right(images: ImageData, split: str, pairs: list[Pair]) -> float:
    """How many of the labels are what the pixels say."""
    pixels = [np.array(images.splits[split][pair.image]["image"])[0, 0] for pair in pairs]
    label, _, _ = read(np.array(pixels))
    return float(np.mean(label == [pair.label for pair in pairs]))


@pytest.mark.parametrize("split", SPLITS)
def test_the_released_indexing_would_be_found_out(split: str, images: ImageData) -> None:
    data = DataSettings(num_clients=6, min_examples=30)
    clients = partition(images, data, 0)
    assert [right(images, split, ours(images, split, c)) for c in clients] == [1.0] * 6
    released = [as_released(images, split, c) for c in clients]
    # About one in six: an image says nothing about its label
    assert np.mean([right(images, split, pairs) for pairs in released]) < 0.4
    # And clients of a domain share their images
    first, second = ({pair.image for pair in released[k]} for k in (0, 1))
    assert first <= second or second <= first
    first, second = ({pair.image for pair in ours(images, split, clients[k])} for k in (0, 1))
    assert not first & second


# The same image in two splits


def test_splits_that_share_images_are_found_by_content(images: ImageData) -> None:
    assert duplicates(images) == {}
    train, test = images.splits["train"], images.splits["test"]
    leaking = datasets.concatenate_datasets([test, train.select([0, 5])])
    found = duplicates(ImageData("x", (), (), "", {**images.splits, "test": leaking}))
    assert found == {("train", "test"): 2}


def test_the_embedded_data_set_shares_one(monkeypatch: pytest.MonkeyPatch) -> None:
    # Fluent draws a black medium square in test as it draws a white square button in training
    monkeypatch.delenv("PFEDMOAP_ASSETS")
    assert duplicates(load_anew(ImageSettings())) == {("train", "test"): 1}
