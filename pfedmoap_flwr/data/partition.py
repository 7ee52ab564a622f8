"""Partitions: which client holds which images, the same way in train, validation and test."""

import hashlib
import inspect
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pfedmoap_flwr.data import SPLITS
from pfedmoap_flwr.data.groups import together, units
from pfedmoap_flwr.data.images import ImageData
from pfedmoap_flwr.data.partitioners import CUTS, Part, class_sizes
from pfedmoap_flwr.data.settings import DataSettings
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.randomness import numpy_generator
from pfedmoap_flwr.settings import Value, key_of

MIN_TEST = 2
ATTEMPTS = 1000

logger = logging.getLogger("flwr.pfedmoap")


@dataclass(frozen=True, eq=False)
class ClientRows:
    """One client's images: row numbers into each split; `domain` where it has just one, or ""."""

    client_id: int
    domain: str
    rows: dict[str, np.ndarray]


def partition(images: ImageData, data: DataSettings, seed: int) -> list[ClientRows]:
    """Return every client's rows, in order, a function of the settings and the seed alone.

    Each image lies with one client (of the training images, `data.shots` may leave some out). Every
    client has `data.min-examples` training images before `data.shots`, and 2 test images. Where
    images lie in groups, groups are drawn: each with one client, and so many for every client.

    Raises UsageError where the numbers do not allow it.
    """
    own = {name: getattr(data, name) for name in _own_settings(data)}
    # First of all: a partitioner makes room for every client
    if data.num_clients > (there := len(images.splits["train"])):
        raise UsageError(
            f"setting data.num-clients={data.num_clients}: {images.name} has {there} training "
            "images, and every client needs one"
        )
    small = {split: units(images.splits[split]) for split in SPLITS}
    drawn = images
    if any(members for _, members in small.values()):
        drawn = replace(images, splits={split: table for split, (table, _) in small.items()})
    parts = CUTS[data.partition](drawn, data.num_clients, **own)
    if "alpha" in own and len(parts) == data.num_clients > 1:
        logger.warning(
            "data.partition=%s: every client has a domain to itself, so data.alpha=%s divides "
            "nothing; raise data.num-clients=%d",
            *(data.partition, data.alpha, data.num_clients),
        )
    pieces = [
        {split: together(small[split][1], rows[split]) for split in SPLITS}
        for number, part in enumerate(parts)
        for rows in _share_out(drawn, part, data, (seed, "partition", number))
    ]
    clients = [ClientRows(i, _domain(images, rows), rows) for i, rows in enumerate(pieces)]
    return [_few_shot(images, c, data.shots, seed) if data.shots else c for c in clients]


def class_counts(images: ImageData, clients: Sequence[ClientRows], split: str) -> np.ndarray:
    """Return how many images of each class every client has in a split: (clients, C)."""
    return np.array([_counts(images, split, client.rows[split]) for client in clients])


def whole(images: ImageData, data: DataSettings, client_id: int, seed: int) -> ClientRows:
    """Return the client that holds every image: the one of a node with a folder of its own."""
    rows = {split: np.arange(len(images.splits[split])) for split in SPLITS}
    domain = images.domains[0] if len(images.domains) == 1 else ""
    holder = ClientRows(client_id, domain, rows)
    few = data.shots and len(rows["train"])
    return _few_shot(images, holder, data.shots, seed) if few else holder


def manifest(
    images: ImageData, data: DataSettings, seed: int, clients: Sequence[ClientRows]
) -> dict[str, Any]:
    """Return a description of a partition, for JSON, with a SHA-256 of the rest.

    The digest is that of `json.dumps(rest, sort_keys=True)`.
    """
    shared = ("name", "partition", "num_clients", "min_examples", "shots")
    settings: dict[str, Value] = {
        f"data.{key_of(name)}": getattr(data, name) for name in (*shared, *_own_settings(data))
    }
    said: dict[str, Any] = {
        "settings": {**settings, "seed": seed},
        "images": {split: len(images.splits[split]) for split in SPLITS},
        "classnames": list(images.classnames),
        "clients": [
            {
                "client": client.client_id,
                "domain": client.domain,
                "rows": {s: rows.tolist() for s, rows in client.rows.items()},
                "classes": {s: _counts(images, s, r).tolist() for s, r in client.rows.items()},
            }
            for client in clients
        ],
    }
    return {**said, "sha256": digest(said)}


def digest(said: dict[str, Any]) -> str:
    """Return the SHA-256 of what a manifest says, whether or not that is in it already."""
    rest = {key: value for key, value in said.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _own_settings(data: DataSettings) -> list[str]:
    """Return the fields that the chosen partitioner reads: its keyword-only parameters."""
    parameters = inspect.signature(CUTS[data.partition]).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]


def _share_out(
    images: ImageData, part: Part, data: DataSettings, seed: tuple[int | str, ...]
) -> list[dict[str, np.ndarray]]:
    """Draw until every client of the part has enough images to train and to test on."""
    members = {split: part.members[split] if part.members else None for split in SPLITS}
    sizes = {split: class_sizes(images, split, members[split]) for split in SPLITS}
    least = {"train": data.min_examples, "test": MIN_TEST}
    # With too few images in all, no draw can succeed
    possible = all(sizes[s].sum() >= part.clients * n for s, n in least.items())
    for attempt in range(ATTEMPTS if possible else 0):
        rng = numpy_generator(*seed, attempt)
        shares = part.draw(rng)
        counts = {split: part.whole(shares, sizes[split]) for split in SPLITS}
        if all(counts[s].sum(axis=0).min() >= n for s, n in least.items()):
            dealt = {s: _deal(images, s, members[s], counts[s], rng) for s in SPLITS}
            return [{s: dealt[s][k] for s in SPLITS} for k in range(part.clients)]
    remedies = [f"lower data.min-examples={data.min_examples}"]
    remedies += [f"lower data.num-clients={data.num_clients}"] * (part.clients > 1)
    remedies += [f"change data.{key_of(n)}={getattr(data, n)}" for n in _own_settings(data)]
    raise UsageError(
        f"setting data.partition={data.partition!r}: no draw{f' of {ATTEMPTS}' * possible} gives "
        f"each of {part.clients} clients{part.name} {data.min_examples} training and {MIN_TEST} "
        f"test images of the {sizes['train'].sum()} and {sizes['test'].sum()} there are; "
        + " or ".join(remedies)
    )


def _deal(
    images: ImageData,
    split: str,
    members: np.ndarray | None,
    counts: np.ndarray,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """Return for each client the rows of a split that make up its counts (C, N), at random."""
    labels = images.column(split, "label")
    pieces: list[list[np.ndarray]] = [[] for _ in range(counts.shape[1])]
    for c, of_class in enumerate(counts):
        chosen = labels == c if members is None else (labels == c) & members
        rows = rng.permutation(np.flatnonzero(chosen))
        for piece, chunk in zip(pieces, np.split(rows, np.cumsum(of_class)[:-1]), strict=True):
            piece.append(chunk)
    return [np.sort(np.concatenate(piece)) for piece in pieces]


def _domain(images: ImageData, rows: dict[str, np.ndarray]) -> str:
    numbers = np.unique(np.concatenate([images.column(s, "domain")[rows[s]] for s in SPLITS]))
    return images.domains[numbers[0]] if len(numbers) == 1 else ""


def _counts(images: ImageData, split: str, rows: np.ndarray) -> np.ndarray:
    return np.bincount(images.column(split, "label")[rows], minlength=len(images.classnames))


def _few_shot(images: ImageData, client: ClientRows, shots: int, seed: int) -> ClientRows:
    """Keep `shots` training images per class of the client, or all where it has fewer.

    Fewer shots are a part of more.
    """
    rows = client.rows["train"]
    labels = images.column("train", "label")[rows]
    rng = numpy_generator(seed, "shots", client.client_id)
    kept = [rng.permutation(rows[labels == c])[:shots] for c in np.unique(labels)]
    return ClientRows(
        client.client_id, client.domain, {**client.rows, "train": np.sort(np.concatenate(kept))}
    )
