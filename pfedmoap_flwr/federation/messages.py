"""Tensors <-> Flower's records, and what the two sides write into each other's messages.

query     down: config {run}
          up:   card (see `handshake`)
train     down: arrays, config {run, round}
          up:   arrays, metrics {client, num-examples, loss, method.NAME ...}
evaluate  down: arrays, config {run, round, zeroshot}
          up:   metrics {client, personal-accuracy, global-validation-accuracy ...}
"""

from collections.abc import Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

METHOD_METRIC = "method."
"""What a metric of a method's own begins with, so that it is never taken for one of ours."""


def to_arrays(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Return a fresh record; no array is shared with the caller or with another message."""
    return ArrayRecord({name: Array(t.detach().cpu().numpy()) for name, t in tensors.items()})


def to_tensors(arrays: ArrayRecord) -> dict[str, Tensor]:
    """Return the tensors of a record, by name, in memory of their own."""
    return {name: torch.from_numpy(np.array(array.numpy())) for name, array in arrays.items()}


def num_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Return the bytes of the numbers that travel (without record headers)."""
    return sum(t.numel() * t.element_size() for t in tensors.values())
