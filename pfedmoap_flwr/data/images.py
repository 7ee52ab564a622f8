"""The data sets, as labelled images in train, validation and test splits."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import datasets
import numpy as np
import pyarrow.parquet as pq

from pfedmoap_flwr.assets import asset
from pfedmoap_flwr.errors import UsageError

SPLITS = ("train", "validation", "test")


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
    return ImageData(
        name=name,
        classnames=tuple(features["label"].names),
        domains=tuple(features["domain"].names),
        template="a drawing of {}.",
        splits=splits,
    )
