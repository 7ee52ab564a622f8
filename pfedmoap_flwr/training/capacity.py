"""How many clients train at once on a device: what its memory and its cores allow."""

import os
from typing import Any

import psutil
import torch
from torch import Tensor

from pfedmoap_flwr.methods.base import Method, Work
from pfedmoap_flwr.training.local import first_images
from pfedmoap_flwr.training.stacked import Stack

MOST_STACKED = 64
"""More heads than this do not make a GPU faster."""
ALWAYS_MEASURED = 256
"""Images of a batch for which room is reckoned of where this client has fewer."""
MEMORY_SHARE = 0.5
"""Of the device's memory, for what steps keep for their backward pass."""


def clients_that_fit(method: Method[Any, Any], work: Work[Any]) -> int:
    """Return how many clients like this one can train at once, at least 1.

    From the device's whole memory, not from what is free, so that a repeat chooses the same.
    """
    device = method.clip.device
    count = min(method.settings.batch_size, max(len(work.images), ALWAYS_MEASURED))
    needed = bytes_of_step(method, work, count)
    fits = int(MEMORY_SHARE * memory(device)) // max(1, needed)
    return max(1, min(fits, cores() if device.type == "cpu" else MOST_STACKED))


def bytes_of_step(method: Method[Any, Any], work: Work[Any], images: int) -> int:
    """Return the bytes that a step of one client keeps for its backward pass, CLIP's own aside.

    Of a head that was not trained: after that only what the last phase moved asks for gradients.
    """
    frozen = {p.untyped_storage().data_ptr() for p in method.clip.model.parameters()}
    return saved_bytes(Stack(method, [work]), *first_images([work], images), without=frozen)


def saved_bytes(stack: Stack, features: Tensor, labels: Tensor, without: set[int]) -> int:
    """Return the bytes that one step keeps for its backward pass.

    `without`: data pointers of tensors that are not counted. The result depends on shapes alone.
    """
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        stack.losses(features, labels)
    return sum(size for place, size in sizes.items() if place not in without)


def memory(device: torch.device) -> int:
    """Return the bytes of memory that a device has in all."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
