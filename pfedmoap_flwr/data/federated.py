"""Who holds which images of which classes: put together once in a process."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from pfedmoap_flwr.data import SPLITS
from pfedmoap_flwr.data.catalogue import FOLDER
from pfedmoap_flwr.data.images import ImageData, load_images
from pfedmoap_flwr.data.partition import ClientRows, partition, whole
from pfedmoap_flwr.data.settings import DataSettings
from pfedmoap_flwr.errors import UsageError


@dataclass(frozen=True)
class Task:
    """What is classified: class names in label order, and a sentence with {} for zero-shot.

    held_out: the classes that nobody trains, of the labels that follow.
    """

    classnames: tuple[str, ...]
    template: str
    held_out: tuple[str, ...] = ()

    @property
    def all_classnames(self) -> tuple[str, ...]:
        """The trained classes and the others, in the order of their labels."""
        return self.classnames + self.held_out

    def turned(self) -> "Task":
        """Return the task of telling apart the classes that nobody trains."""
        return Task(self.held_out, self.template, self.classnames)


@dataclass(frozen=True, eq=False)
class Federated:
    """A data set, the clients that hold it by client_id, and the task that they share.

    Clients hold images of the task's classes alone, and none of a domain that is left out.

    open_rows: of all test images those that no client's test images stand for: where classes are
    held out "base" and "novel", by class; where a domain is left out "unseen", its own.
    """

    images: ImageData
    clients: Mapping[int, ClientRows]
    task: Task
    open_rows: Mapping[str, np.ndarray] = field(default_factory=dict)


@functools.lru_cache(maxsize=8)  # a comparison goes over its seeds once for each method
def federated(data: DataSettings, seed: int) -> Federated:
    """Load a data set and divide it among the clients; the same arguments give the same object.

    Raises UsageError where the data set is not to be had, or the partition is impossible.
    """
    images = load_images(data)
    held, rows = _held(images, data)
    clients = partition(held, data, seed)
    return _federated(images, data, {c.client_id: _within(c, rows) for c in clients})


def own_folder(data: DataSettings, folder: str, client_id: int, seed: int) -> Federated:
    """Load the images of a node that has a folder of its own: all of them are its client's.

    Raises UsageError that names the client where its folder is not what it should be.
    """
    try:
        images = load_images(data.model_copy(update={"name": FOLDER, "path": folder}))
        held, rows = _held(images, data)
        client = _within(whole(held, data, client_id, seed), rows)
    except UsageError as error:
        raise UsageError(f"client {client_id}, data-dir={folder}: {error}") from error
    return _federated(images, data, {client_id: client})


def num_base(images: ImageData, data: DataSettings) -> int:
    """Return how many classes are trained: the first ones, as in CoOp's base-to-new split.

    Raises UsageError where fewer than two are, or none is left of a part.
    """
    classes = len(images.classnames)
    base = math.ceil(data.base_classes * classes)
    if data.base_classes < 1 and not 2 <= base < classes:
        raise UsageError(
            f"setting data.base-classes={data.base_classes:g} makes {base} of {classes} classes "
            "base ones; at least 2 must be, and 1 must be left"
        )
    return base


def left_out(images: ImageData, data: DataSettings) -> int | None:
    """Return the number of the domain that nobody holds, or None.

    Raises UsageError where there is no such domain, or no other one.
    """
    name = data.left_out_domain
    if not name:
        return None
    if name not in images.domains or len(images.domains) < 2:
        domains = ", ".join(images.domains) or "no domains"
        raise UsageError(
            f"setting data.left-out-domain={name!r}: {images.name} has {domains}; name one of "
            "at least two"
        )
    return images.domains.index(name)


def _federated(
    images: ImageData, data: DataSettings, clients: Mapping[int, ClientRows]
) -> Federated:
    base, unseen = num_base(images, data), left_out(images, data)
    names, template = images.classnames, data.template or images.template
    task = Task(names[:base], template, names[base:])
    labels, domains = images.column("test", "label"), images.column("test", "domain")
    seen = np.ones(len(labels), bool) if unseen is None else domains != unseen
    open_rows: dict[str, np.ndarray] = {}
    if task.held_out:
        open_rows["base"] = np.flatnonzero((labels < base) & seen)
        open_rows["novel"] = np.flatnonzero((labels >= base) & seen)
    if unseen is not None:
        open_rows["unseen"] = np.flatnonzero((labels < base) & ~seen)
    return Federated(images, clients, task, open_rows)


def _held(images: ImageData, data: DataSettings) -> tuple[ImageData, dict[str, np.ndarray]]:
    """Return the images that clients hold, and their rows in each split of all images."""
    base, unseen = num_base(images, data), left_out(images, data)
    if base == len(images.classnames) and unseen is None:
        return images, {split: np.arange(len(images.splits[split])) for split in SPLITS}
    rows, splits = {}, {}
    for split in SPLITS:
        kept, table = images.column(split, "label") < base, images.splits[split]
        domains = images.column(split, "domain")
        if unseen is not None:
            kept &= domains != unseen
        rows[split] = np.flatnonzero(kept)
        numbers = domains[kept]
        if unseen is not None:
            numbers = numbers - (numbers > unseen)
        splits[split] = (
            table.select(rows[split]).remove_columns("domain").add_column("domain", numbers)
        )
    there = tuple(name for i, name in enumerate(images.domains) if i != unseen)
    held = replace(images, classnames=images.classnames[:base], domains=there, splits=splits)
    return held, rows


def _within(client: ClientRows, rows: Mapping[str, np.ndarray]) -> ClientRows:
    """Return a client of some of the images, by its rows in all of them."""
    return replace(client, rows={split: rows[split][own] for split, own in client.rows.items()})
