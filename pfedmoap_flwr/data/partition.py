"""Partitions: which client holds which images, the same way in train, validation and test."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from pfedmoap_flwr.data.images import SPLITS, ImageData, ImageSettings
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.randomness import numpy_generator
from pfedmoap_flwr.settings import setting


@dataclass(frozen=True)
class DataSettings(ImageSettings):
    """The images and who holds them."""

    template: str = setting(
        "", "zero-shot sentence with {} for the class; empty: the data set's own"
    )
    partition: Literal["dirichlet-domain", "pathological"] = setting(
        "dirichlet-domain", "how images go to clients"
    )
    num_clients: int = setting(20, "clients N", low=1)
    alpha: float = setting(0.3, "Dirichlet concentration; small is skewed", above=0)
    shots: int = setting(0, "training images per class and client; 0: all", low=0)


MIN_TRAIN, MIN_TEST = 10, 2
ATTEMPTS = 1000


@dataclass(frozen=True, eq=False)
class ClientRows:
    """One client's images: row numbers into each split; `domain` where it has just one, or ""."""

    client: int
    domain: str
    rows: dict[str, np.ndarray]


def partition(images: ImageData, data: DataSettings, seed: int) -> list[ClientRows]:
    """Return every client's rows, a function of the settings and the seed alone.

    Raises UsageError where the numbers do not allow it.
    """
    makers = {"dirichlet-domain": _dirichlet_domain, "pathological": _pathological}
    clients = makers[data.partition](images, data, seed)
    return [_few_shot(images, c, data.shots, seed) if data.shots else c for c in clients]


def whole(images: ImageData, data: DataSettings, client: int, seed: int) -> ClientRows:
    """Return the client that holds every image: the one of a node with a folder of its own."""
    rows = {split: np.arange(len(images.splits[split])) for split in SPLITS}
    domain = images.domains[0] if len(images.domains) == 1 else ""
    holder = ClientRows(client, domain, rows)
    few = data.shots and len(rows["train"])
    return _few_shot(images, holder, data.shots, seed) if few else holder


def _dirichlet_domain(images: ImageData, data: DataSettings, seed: int) -> list[ClientRows]:
    """Within each domain, class c goes to that domain's clients in proportions p_c ~ Dir(alpha).

    The same p_c cuts train, validation and test, so a client's splits follow one distribution.
    """
    per_domain, rest = divmod(data.num_clients, len(images.domains))
    if rest or not per_domain:
        raise UsageError(
            f"setting data.num-clients={data.num_clients}: with data.partition=dirichlet-domain it "
            f"must be a multiple of the {len(images.domains)} domains of {images.name}"
        )
    clients: list[ClientRows] = []
    for domain, domain_name in enumerate(images.domains):
        parts = _dirichlet(images, domain, per_domain, data.alpha, seed)
        clients += [ClientRows(len(clients) + k, domain_name, rows) for k, rows in enumerate(parts)]
    return clients


def _dirichlet(
    images: ImageData, domain: int, clients: int, alpha: float, seed: int
) -> list[dict[str, np.ndarray]]:
    """Draw until every client of the domain has enough images to train and to test on."""
    for attempt in range(ATTEMPTS):
        rng = numpy_generator(seed, "partition", domain, attempt)
        shares = rng.dirichlet([alpha] * clients, size=len(images.classnames))
        cuts = np.cumsum(shares, axis=1)[:, :-1]
        parts: list[dict[str, np.ndarray]] = [{} for _ in range(clients)]
        for split in SPLITS:
            label, of_domain = images.column(split, "label"), images.column(split, "domain")
            pieces: list[list[np.ndarray]] = [[] for _ in range(clients)]
            for c in range(len(images.classnames)):
                rows = rng.permutation(np.flatnonzero((label == c) & (of_domain == domain)))
                bounds = np.floor(cuts[c] * len(rows) + 0.5).astype(int)
                for piece, chunk in zip(pieces, np.split(rows, bounds), strict=True):
                    piece.append(chunk)
            for part, piece in zip(parts, pieces, strict=True):
                part[split] = np.sort(np.concatenate(piece))
        if all(len(p["train"]) >= MIN_TRAIN and len(p["test"]) >= MIN_TEST for p in parts):
            return parts
    raise UsageError(
        f"setting data.alpha={alpha}: no draw of {ATTEMPTS} gave each of {clients} clients of a "
        f"domain {MIN_TRAIN} training and {MIN_TEST} test images; use a larger alpha or fewer "
        "clients"
    )


def _pathological(images: ImageData, data: DataSettings, seed: int) -> list[ClientRows]:
    """Deal the classes out in disjoint, even groups, one group a client (McMahan et al. 2017)."""
    if data.num_clients > len(images.classnames):
        raise UsageError(
            f"setting data.num-clients={data.num_clients}: with data.partition=pathological each "
            f"client needs a class of its own; {images.name} has {len(images.classnames)}"
        )
    order = numpy_generator(seed, "partition").permutation(len(images.classnames))
    groups = np.array_split(order, data.num_clients)
    return [
        ClientRows(
            client,
            images.domains[0] if len(images.domains) == 1 else "",
            {s: np.flatnonzero(np.isin(images.column(s, "label"), group)) for s in SPLITS},
        )
        for client, group in enumerate(groups)
    ]


def _few_shot(images: ImageData, client: ClientRows, shots: int, seed: int) -> ClientRows:
    """Keep `shots` training images per class of the client, or all where it has fewer."""
    rows = client.rows["train"]
    labels = images.column("train", "label")[rows]
    rng = numpy_generator(seed, "shots", client.client)
    kept = [rng.permutation(rows[labels == c])[:shots] for c in np.unique(labels)]
    return ClientRows(
        client.client, client.domain, {**client.rows, "train": np.sort(np.concatenate(kept))}
    )
