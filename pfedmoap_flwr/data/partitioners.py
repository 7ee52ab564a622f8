"""The partitioners, which divide a data set among clients: one function each, found by its name.

A partitioner returns `Part`s: which images which clients share out among themselves, and how to
draw their shares, the fraction of every class that goes to each client. The same shares cut train,
validation and test, so that all splits of a client follow one class distribution. Keyword-only
parameters are the settings that a partitioner reads besides the number of clients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pfedmoap_flwr.data import SPLITS
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.settings import key_of

# For types alone: settings take the partitioners' names from here before any data set is loaded
if TYPE_CHECKING:
    from pfedmoap_flwr.data.images import ImageData

# Numbers that differ by less are taken as equal: the last bits of a sum depend on the machine
SAME = 1e-9


def nearest(shares: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return whole numbers (C, N) for shares (C, N) of sizes (C,): cumulated shares are rounded.

    Each is at most 1 away from its share of the class.
    """
    inner = np.floor(np.cumsum(shares, axis=1)[:, :-1] * sizes[:, None] + 0.5).astype(np.int64)
    return np.diff(inner, axis=1, prepend=0, append=sizes[:, None])


def evenly(shares: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return whole numbers (C, N) for shares (C, N) of sizes (C,), each less than 1 off.

    What is left of a class after rounding down goes to the clients that lost most by rounding so
    far. With equal shares the clients' totals thus differ by at most one.
    """
    ideal = shares * sizes[:, None]
    counts = np.floor(ideal + SAME).astype(np.int64)
    owed = np.zeros(shares.shape[1])
    for wanted, given, size in zip(ideal, counts, sizes, strict=True):
        owed += wanted - given
        fraction = wanted - given > SAME
        # Stable, so that among equals the lower number comes first on every machine
        order = np.argsort(-np.round(np.where(fraction, owed, -np.inf), 9), kind="stable")
        winners = order[: size - given.sum()]
        given[winners] += 1
        owed[winners] -= 1
    return counts


@dataclass(frozen=True, eq=False)
class Part:
    """Images that so many clients share out among themselves.

    `draw` returns shares (C, clients), each row with the sum 1. `members` says by a mask (n,) of
    each split which images these are (None: all); `name` says it in words.
    """

    clients: int
    draw: Callable[[np.random.Generator], np.ndarray]
    whole: Callable[[np.ndarray, np.ndarray], np.ndarray] = evenly
    members: Mapping[str, np.ndarray] | None = None
    name: str = ""


Cut = Callable[..., list[Part]]
CUTS: dict[str, Cut] = {}


def cut(function: Cut) -> Cut:
    """Make a function a value of `data.partition`."""
    CUTS[key_of(function.__name__)] = function
    return function


@cut
def iid(images: ImageData, clients: int) -> list[Part]:
    """Everyone the same: each class dealt out evenly (IID of McMahan et al. 2017, stratified)."""
    equal = np.full((len(images.classnames), clients), 1 / clients)
    return [Part(clients, lambda rng: equal)]


@cut
def pathological(images: ImageData, clients: int) -> list[Part]:
    """Deal the classes out in disjoint, even groups, one a client.

    pFedMoAP (Luo et al. 2025), Table 1, after the extreme case of McMahan et al. 2017. Group sizes
    differ by at most one, where the released code lets the last client take the remainder.
    """
    classes = len(images.classnames)
    if clients > classes:
        raise UsageError(
            f"setting data.num-clients={clients}: with data.partition=pathological each client "
            f"needs a class of its own; {images.name} has {classes}"
        )

    def draw(rng: np.random.Generator) -> np.ndarray:
        shares = np.zeros((classes, clients))
        for client, group in enumerate(np.array_split(rng.permutation(classes), clients)):
            shares[group, client] = 1
        return shares

    return [Part(clients, draw)]


@cut
def dirichlet(images: ImageData, clients: int, *, alpha: float) -> list[Part]:
    """Class c goes to all clients in proportions p_c ~ Dir(alpha) (Yurochkin et al. 2019)."""
    classes = len(images.classnames)
    return [Part(clients, lambda rng: rng.dirichlet([alpha] * clients, size=classes), nearest)]


@cut
def dirichlet_domain(images: ImageData, clients: int, *, alpha: float) -> list[Part]:
    """`dirichlet` within each domain, so that a client has one domain (pFedMoAP, Table 3).

    The clients of a domain follow each other; every domain has the same number of them.
    """
    per_domain, rest = divmod(clients, len(images.domains))
    if rest or not per_domain:
        raise UsageError(
            f"setting data.num-clients={clients}: with data.partition=dirichlet-domain it must be "
            f"a multiple of the {len(images.domains)} domains of {images.name}"
        )
    (whole,) = dirichlet(images, per_domain, alpha=alpha)
    return [
        Part(
            per_domain,
            whole.draw,
            nearest,
            {split: images.column(split, "domain") == number for split in SPLITS},
            f" of domain {name}",
        )
        for number, name in enumerate(images.domains)
    ]


@cut
def shards(images: ImageData, clients: int, *, shards_per_client: int) -> list[Part]:
    """Sort by class, cut into equal shards, deal each client so many of them (McMahan et al. 2017).

    The shards are those of the training images; a class's shares are how much of it lies in the
    shards of each client, and they cut the other splits too.
    """
    if (number := clients * shards_per_client) > (there := len(images.column("train", "label"))):
        raise UsageError(
            f"setting data.shards-per-client={shards_per_client}: {number} shards of {clients} "
            f"clients; {images.name} has {there} training images; lower it, or lower "
            f"data.num-clients={clients}"
        )
    # A class without training images still has its place in the order
    sizes = np.maximum(class_sizes(images, "train"), 1e-6)
    ends = np.cumsum(sizes)
    edges = np.linspace(0, ends[-1], clients * shards_per_client + 1)
    last = np.minimum(ends[:, None], edges[1:])
    first = np.maximum((ends - sizes)[:, None], edges[:-1])
    inside = np.clip(last - first, 0, None)  # (C, shards): images of a class in a shard
    inside /= inside.sum(axis=1, keepdims=True)

    def draw(rng: np.random.Generator) -> np.ndarray:
        owners = rng.permutation(np.repeat(np.arange(clients), shards_per_client))
        shares = np.zeros((clients, len(sizes)))
        np.add.at(shares, owners, inside.T)
        return shares.T

    return [Part(clients, draw)]


@cut
def natural(images: ImageData, clients: int, *, id_column: str) -> list[Part]:
    """One client for each value of a column, e.g. its domain, writer or camera, in their order.

    As in LEAF (Caldas et al. 2018). A client's test images are those that its id has.
    """
    ids, codes = _column(images, "id-column", id_column)
    if clients != len(ids):
        raise UsageError(
            f"setting data.num-clients={clients}: data.partition=natural gives one client for each "
            f"of the {len(ids)} values of data.id-column={id_column!r}; set "
            f"data.num-clients={len(ids)}"
        )
    all_ = np.ones((len(images.classnames), 1))
    return [
        Part(
            1,
            lambda rng: all_,
            members={split: codes[split] == number for split in SPLITS},
            name=f" with {id_column}={value}",
        )
        for number, value in enumerate(ids)
    ]


@cut
def pachinko(
    images: ImageData, clients: int, *, alpha: float, fine_alpha: float, coarse_column: str
) -> list[Part]:
    """Pachinko allocation (Reddi et al. 2021): a client draws images by coarse, then fine class.

    As pFedMoAP's released code does it for CIFAR-100, over the images of all splits together: each
    client in turn draws q ~ Dir(alpha) over the coarse classes and w ~ Dir(fine-alpha) over the
    fine classes of each, then its images one by one, a coarse class from q and one of its fine
    classes from w; what is used up is dropped. There, chance says which of a client's images are
    test images; here, all splits are cut by its shares of the classes.
    """
    coarse = _coarse(images, coarse_column)
    stock = sum(class_sizes(images, split) for split in SPLITS)

    def draw(rng: np.random.Generator) -> np.ndarray:
        counts = _pachinko(coarse, np.asarray(stock), clients, alpha, fine_alpha, rng)
        return counts / np.maximum(stock, 1)[:, None]

    return [Part(clients, draw)]


def class_sizes(images: ImageData, split: str, members: np.ndarray | None = None) -> np.ndarray:
    """Return how many images of each class (C,) a split has, or the masked ones of it."""
    labels = images.column(split, "label")
    labels = labels if members is None else labels[members]
    return np.bincount(labels, minlength=len(images.classnames))


def _pachinko(
    coarse: np.ndarray,
    stock: np.ndarray,
    clients: int,
    alpha: float,
    fine_alpha: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """Return how many images (C, clients) of the stock (C,) each client draws.

    Proportions are drawn over all classes and renormalised over those that are left, which is the
    Dirichlet distribution over those that are left.
    """
    left, counts = stock.copy(), np.zeros((len(stock), clients), dtype=np.int64)
    for client, images in enumerate(np.array_split(np.arange(stock.sum()), clients)):
        # A tiny alpha rounds proportions to 0; they still count when nothing else is left
        q = np.maximum(rng.dirichlet([alpha] * (coarse.max() + 1)), 1e-100)
        w = np.maximum(rng.dirichlet([fine_alpha] * len(stock)), 1e-100)
        missing = len(images)
        while missing:
            weights = w * (left > 0)
            of_coarse = np.bincount(coarse, weights)
            p = q[coarse] * weights / np.where(of_coarse > 0, of_coarse, 1)[coarse]
            drawn = rng.choice(len(stock), size=missing, p=p / p.sum())
            # Up to the draw that uses a class up; then again, with what is left
            used_up = np.flatnonzero(np.bincount(drawn, minlength=len(stock)) >= left)
            ends = [np.flatnonzero(drawn == c)[left[c] - 1] + 1 for c in used_up if left[c]]
            taken = np.bincount(drawn[: min(ends, default=missing)], minlength=len(stock))
            left -= taken
            counts[:, client] += taken
            missing -= taken.sum()
    return counts


def _coarse(images: ImageData, column: str) -> np.ndarray:
    """Return the coarse class (C,) of each class; 0 for one that has no image.

    Raises UsageError where the data set does not say it, or says it differently for two images.
    """
    _, codes = _column(images, "coarse-column", column)
    coarse = np.zeros(len(images.classnames), dtype=np.int64)
    for split in SPLITS:
        coarse[images.column(split, "label")] = codes[split]
    for split in SPLITS:
        labels = images.column(split, "label")
        if (wrong := np.flatnonzero(coarse[labels] != codes[split])).size:
            raise UsageError(
                f"setting data.coarse-column={column!r}: images of class "
                f"{images.classnames[labels[wrong[0]]]!r} have more than one value of it; it must "
                "group whole classes"
            )
    return coarse


def _column(images: ImageData, key: str, column: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the values of a column, in order, and for each split the value's number (n,)."""
    there = images.splits["train"].column_names
    if column not in there:
        raise UsageError(
            f"setting data.{key}={column!r}: {images.name} has no such column; it has "
            f"{', '.join(there)}"
        )
    read = [np.asarray(images.splits[s].with_format(None)[column][:]) for s in SPLITS]
    values, codes = np.unique(np.concatenate(read), return_inverse=True)
    ends = np.cumsum([len(part) for part in read])
    return values, dict(zip(SPLITS, np.split(codes, ends[:-1]), strict=True))
