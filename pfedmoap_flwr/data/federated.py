"""Who holds which images of which classes: put together once in a process."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from pfedmoap_flwr.data.catalogue import FOLDER
from pfedmoap_flwr.data.images import ImageData, load_images
from pfedmoap_flwr.data.partition import ClientRows, partition, whole
from pfedmoap_flwr.data.settings import DataSettings
from pfedmoap_flwr.errors import UsageError


@dataclass(frozen=True)
class Task:
    """What is classified: class names in label order, and a sentence with {} for zero-shot."""

    classnames: tuple[str, ...]
    template: str


@dataclass(frozen=True, eq=False)
class Federated:
    """A data set, the clients that hold it by client_id, and the task that they share."""

    images: ImageData
    clients: Mapping[int, ClientRows]
    task: Task


@functools.lru_cache(maxsize=8)  # a comparison goes over its seeds once for each method
def federated(data: DataSettings, seed: int) -> Federated:
    """Load a data set and divide it among the clients; the same arguments give the same object.

    Raises UsageError where the data set is not to be had, or the partition is impossible.
    """
    images = load_images(data)
    clients = {rows.client_id: rows for rows in partition(images, data, seed)}
    return Federated(images, clients, _task(images, data))


def own_folder(data: DataSettings, folder: str, client_id: int, seed: int) -> Federated:
    """Load the images of a node that has a folder of its own: all of them are its client's.

    Raises UsageError that names the client where its folder is not what it should be.
    """
    try:
        images = load_images(data.model_copy(update={"name": FOLDER, "path": folder}))
        clients = {client_id: whole(images, data, client_id, seed)}
    except UsageError as error:
        raise UsageError(f"client {client_id}, data-dir={folder}: {error}") from error
    return Federated(images, clients, _task(images, data))


def _task(images: ImageData, data: DataSettings) -> Task:
    return Task(images.classnames, data.template or images.template)
