"""Tensors <-> Flower's records, and their declared size."""

from collections.abc import Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor


def to_arrays(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Return a fresh record; no array is shared with the caller or with another message."""
    return ArrayRecord({name: Array(t.detach().cpu().numpy()) for name, t in tensors.items()})


def to_tensors(arrays: ArrayRecord) -> dict[str, Tensor]:
    """Return the tensors of a record, by name, in memory of their own."""
    return {name: torch.from_numpy(np.array(array.numpy())) for name, array in arrays.items()}


def num_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Return the bytes of the numbers that travel (without record headers)."""
    return sum(t.numel() * t.element_size() for t in tensors.values())
