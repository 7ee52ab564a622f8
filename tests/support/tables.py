"""Data sets of numbers only, for partitions, which never look at an image."""

from collections.abc import Mapping

import datasets
import numpy as np

from pfedmoap_flwr.data import SPLITS
from pfedmoap_flwr.data.images import ImageData


def table(counts: Mapping[str, np.ndarray]) -> ImageData:
    """So many images (domains, classes) in each split, in a random order.

    Two classes after each other have one `coarse_label`; `writer` goes round in three.
    """
    domains, classes = counts["train"].shape
    splits = {}
    for split in SPLITS:
        cells = np.repeat(np.arange(domains * classes), counts[split].ravel())
        cells = np.random.default_rng(0).permutation(cells)
        columns = {
            "label": cells % classes,
            "domain": cells // classes,
            "coarse_label": cells % classes // 2,
            "writer": np.array(["ann", "bob", "eve"])[np.arange(len(cells)) % 3],
        }
        splits[split] = datasets.Dataset.from_dict({k: v.tolist() for k, v in columns.items()})
    names = tuple(map(str, range(max(classes, domains))))
    return ImageData("numbers", names[:classes], names[:domains], "a {}.", splits)


def even_table(classes: int = 8, domains: int = 3) -> ImageData:
    """60, 20 and 20 images per class and domain."""
    return table(
        {s: np.full((domains, classes), n) for s, n in zip(SPLITS, (60, 20, 20), strict=True)}
    )
