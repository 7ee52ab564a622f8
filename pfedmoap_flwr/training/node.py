"""What all clients of one process share: the frozen CLIP, the images, what is read of them."""

import functools
import threading

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
        self._lock = threading.Lock()

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
        rows = self.federated.clients[client_id].rows[name]
        features = self._features(name)[rows].to(self.clip.device, torch.float32)
        labels = torch.from_numpy(self.federated.images.column(name, "label")[rows])
        return Split(features, labels.to(self.clip.device))

    def _features(self, name: str) -> Tensor:
        """Return what is read of all images of a split, (n, ...), of the type kept on disk."""
        with self._lock:
            if name not in self._read:
                images = self.federated.images.splits[name]
                self._read[name] = read_images(self.clip, images, self.reading.of(name), self.dtype)
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
