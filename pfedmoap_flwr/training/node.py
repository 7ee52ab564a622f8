"""What all clients of one process share: the frozen CLIP, the images, what is read of them."""

import functools
import threading

import numpy as np
import torch
from torch import Tensor

from pfedmoap_flwr.clip.features import Dtype, Reading, read_images
from pfedmoap_flwr.clip.load import FrozenClip, load_clip
from pfedmoap_flwr.clip.settings import ClipSettings
from pfedmoap_flwr.data.federated import Federated, federated, own_folder
from pfedmoap_flwr.data.settings import DataSettings
from pfedmoap_flwr.methods.base import Split

# Clients run in threads: those that begin at once must not each load everything
_LOADING = threading.Lock()


class Node:
    """The images of some clients as one method reads them; nothing of it changes."""

    def __init__(
        self, clip: FrozenClip, federated: Federated, reading: Reading, dtype: Dtype
    ) -> None:
        self.clip = clip
        self.federated = federated
        self.reading = reading
        self.dtype = dtype
        self._read: dict[str, Tensor] = {}
        self._others: dict[Reading, Node] = {}
        self._open: dict[str, Split] = {}
        self._lock, self._opening = threading.Lock(), threading.Lock()

    def reading_as(self, reading: Reading) -> "Node":
        """Return the node of the same images and clients with another reading."""
        if reading == self.reading:
            return self
        with self._lock:
            if reading not in self._others:
                self._others[reading] = Node(self.clip, self.federated, reading, self.dtype)
            return self._others[reading]

    def split(self, client_id: int, name: str) -> Split:
        """Return a client's part of a split, float32 and on the device: (n, ...) and labels (n,).

        Only the split asked for is read, the first time from disk or by computing it.
        """
        return self.rows_of(name, self.federated.clients[client_id].rows[name])

    def trained_open_splits(self) -> list[str]:
        """Return the names of the open splits whose classes are trained."""
        return [name for name in self.federated.open_rows if name != "novel"]

    def open_split(self, name: str) -> Split:
        """Return the test images of `Federated.open_rows`, "novel" ones with labels from 0.

        They are put together once: every client and model is measured on the same ones.
        """
        with self._opening:
            if name not in self._open:
                data = self.rows_of("test", self.federated.open_rows[name])
                first = len(self.federated.task.classnames) if name == "novel" else 0
                self._open[name] = Split(data.features, data.labels - first)
            return self._open[name]

    def rows_of(self, name: str, rows: np.ndarray) -> Split:
        """Return some images of a split by their rows in it, as `split` does a client's."""
        features = self._features(name)[rows].to(self.clip.device, torch.float32)
        labels = torch.from_numpy(self.federated.images.column(name, "label")[rows])
        return Split(features, labels.to(self.clip.device))

    def _features(self, name: str) -> Tensor:
        """Return what is read of all images of a split, (n, ...), of the type kept on disk."""
        with self._lock:
            if name not in self._read:
                data, reading = self.federated.images, self.reading.of(name)
                self._read[name] = read_images(
                    self.clip, data.splits[name], reading, self.dtype, data.window
                )
            return self._read[name]


def node_of(
    clip: ClipSettings,
    data: DataSettings,
    seed: int,
    device: str,
    reading: Reading,
    folder: str = "",
    client_id: int | None = None,
) -> Node:
    """Return the node of these settings, made once in a process.

    It holds all clients, or with a `folder` the one client whose own images lie there.

    Raises UsageError where images or weights are not to be had.
    """
    if folder and client_id is None:
        raise ValueError(f"{folder} is one client's own folder; say whose")
    with _LOADING:
        return _node(clip, data, seed, device, reading, folder, client_id if folder else None)


def forget_nodes() -> None:
    """Free the nodes of this process; the next `node_of` makes one anew."""
    _node.cache_clear()


@functools.lru_cache(maxsize=4)
def _node(
    clip: ClipSettings,
    data: DataSettings,
    seed: int,
    device: str,
    reading: Reading,
    folder: str,
    owner: int | None,
) -> Node:
    held = federated(data, seed) if owner is None else own_folder(data, folder, owner, seed)
    return Node(load_clip(clip, device), held, reading, clip.features_dtype)
