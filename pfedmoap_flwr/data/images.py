"""The data sets, as labelled images in train, validation and test splits."""

import functools
import hashlib
import itertools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq

from pfedmoap_flwr.assets import asset
from pfedmoap_flwr.errors import UsageError

SPLITS = ("train", "validation", "test")
logger = logging.getLogger("flwr.pfedmoap")


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set: columns `image`, `label` and `domain` in each split.

    `classnames` and `domains` are in label order; `template` is the zero-shot sentence.
    """

    name: str
    classnames: tuple[str, ...]
    domains: tuple[str, ...]
    template: str
    splits: Mapping[str, datasets.Dataset]

    @functools.lru_cache(maxsize=16)  # noqa: B019 - a data set lives as long as its process
    def column(self, split: str, name: str) -> np.ndarray:
        """Return an integer column (n,) of a split."""
        return np.asarray(self.splits[split].with_format("numpy")[name][:], dtype=np.int64)


@functools.lru_cache(maxsize=2)
def load_images(name: str) -> ImageData:
    """Load a data set by name. Raises UsageError where it is unknown or not to be had."""
    if name != "emoji-domains":
        raise UsageError(f"setting data.name={name!r}: unknown data set; there is emoji-domains")
    # Read straight from Parquet: no cache folder, no lock, no temporary copy
    splits = {
        split: datasets.Dataset(pq.read_table(asset(f"{name}/{split}.parquet"))) for split in SPLITS
    }
    features = splits["train"].features
    images = ImageData(
        name=name,
        classnames=tuple(features["label"].names),
        domains=tuple(features["domain"].names),
        template="a drawing of {}.",
        splits=splits,
    )
    for (first, second), count in duplicates(images).items():
        logger.warning("%s: %s images that are %s images too: %d", name, second, first, count)
    return images


def image_digests(images: datasets.Dataset) -> Iterator[bytes]:
    """Yield the SHA-256 of each image's encoded bytes, in their order; nothing is decoded."""
    encoded = images.cast_column("image", datasets.Image(decode=False)).with_format(None)
    for batch in encoded.iter(batch_size=1000):
        for image in batch["image"]:
            content = image["bytes"] or Path(image["path"]).read_bytes()
            yield hashlib.sha256(content).digest()


def duplicates(images: ImageData) -> dict[tuple[str, str], int]:
    """Return {(split, other): how many images of `other` are in `split` too}, where there are any.

    Two images are one where their encoded bytes are; the same picture encoded twice is not seen.
    """
    digests = {split: list(image_digests(images.splits[split])) for split in SPLITS}
    found = {
        (split, other): sum(digest in seen for digest in digests[other])
        for split, other in itertools.combinations(SPLITS, 2)
        for seen in [set(digests[split])]
    }
    return {pair: count for pair, count in found.items() if count}
