"""The splits that a data set does not publish: held out of those it does, by a seed of our own.

Nothing here decodes or copies an image.
"""

from collections.abc import Sequence

import datasets
import numpy as np

from pfedmoap_flwr.data import SPLITS
from pfedmoap_flwr.data.catalogue import Source
from pfedmoap_flwr.data.groups import together, units
from pfedmoap_flwr.randomness import numpy_generator

COOP_SHARES = (0.5, 0.2)  # train and validation; the rest is for testing
COOP_VALIDATION = 0.2
TEST_SHARE = 0.2
# The splits of a data set are the same in every run, whatever the run's seed
SPLIT_SEED = 0


def holdout(
    tables: dict[str, datasets.Dataset], source: Source, validation: float
) -> tuple[dict[str, datasets.Dataset], str]:
    """Return train, validation and test, and a sentence that says where they come from.

    What is missing is held out per class and domain, by a seed that is always the same;
    `validation` is the share of train where a data set publishes no validation images.
    """
    if source.holdout == "coop":
        # CoOp: round(0.5 n) to train, round(0.2 n) to validation, the rest to test
        pooled = datasets.concatenate_datasets([tables[s] for s in sorted(tables)])
        pieces = _divide(pooled, COOP_SHARES, source.name)
        pooled_said = f"{', '.join(sorted(tables))} pooled and cut 50/20/30 per class, as CoOp does"
        return dict(zip(SPLITS, pieces, strict=True)), f"{pooled_said}, by a seed of our own"
    said = [f"{', '.join(s for s in SPLITS if s in tables)} as found"]
    splits = dict(tables)
    if "test" not in splits:
        splits["test"], splits["train"] = _divide(splits["train"], (TEST_SHARE,), source.name)
        said.append(f"test: {TEST_SHARE:.0%} of train per class and domain")
    if "validation" not in splits:
        share = COOP_VALIDATION if source.holdout == "coop-test" else validation
        splits["validation"], splits["train"] = _divide(splits["train"], (share,), source.name)
        held = f"{share:.0%} of train per class and domain" if share else "none"
        said.append(f"validation: {held}")
    return {split: splits[split] for split in SPLITS}, "; ".join(said)


def _divide(table: datasets.Dataset, shares: Sequence[float], name: str) -> list[datasets.Dataset]:
    """Divide a table into len(shares) + 1 parts, the last one the rest, by class and domain.

    What belongs together stays so: shares are of groups where there are any.
    """
    small, members = units(table)
    columns = small.select_columns(["label", "domain"]).with_format("numpy")[:]
    groups = np.stack([columns["domain"], columns["label"]], axis=1).reshape(-1, 2)
    pieces: list[list[np.ndarray]] = [[] for _ in range(len(shares) + 1)]
    for domain, label in np.unique(groups, axis=0).tolist():
        rows = np.flatnonzero((groups == (domain, label)).all(axis=1))
        rng = numpy_generator(SPLIT_SEED, "split", name, domain, label, len(shares))
        rows = rng.permutation(rows)
        bounds = np.cumsum([round(share * len(rows)) for share in shares])
        for piece, chunk in zip(pieces, np.split(rows, bounds), strict=True):
            piece.append(chunk)
    chosen = [np.concatenate([*piece, np.empty(0, np.int64)]) for piece in pieces]
    return [table.select(together(members, rows.astype(np.int64))) for rows in chosen]
