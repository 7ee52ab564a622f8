"""Tensors <-> Flower's records, and what the two sides write into each other's messages.

query     down: config {run}
          up:   card (see `handshake`)
train     down: arrays, config {run, round, trained, best}
          up:   arrays, metrics {client, num-examples, memory, loss, method.NAME ...}
evaluate  down: arrays, config {run, round, trained, zeroshot, scores, adapt}
          up:   metrics {client, personal-accuracy, global-validation-accuracy ...}, and where they
                were asked for scores {personal.f1, personal.f1.low, global.auroc.3 ...}

run is the run's id, trained the last round in which the client trained, or 0. best, where a run
keeps it, is the best validated round, whose head a client does not drop. zeroshot: measure CLIP
before any training too. adapt: train on what came, and measure that.
"""

from collections.abc import Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message
from torch import Tensor

MODELS, MEASURED = (
    ("personal", "global", "zeroshot"),
    (
        "test",
        "validation",
        "base",
        "novel",
        "unseen",
    ),
)


def accuracy_name(model: str, split: str) -> str:
    """Return how an accuracy is called: that of the test images has the shortest name."""
    return f"{model}-accuracy" if split == "test" else f"{model}-{split}-accuracy"


ACCURACIES = tuple(accuracy_name(model, split) for model in MODELS for split in MEASURED)

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


def said(message: Message, name: str) -> object:
    """Return a value of a message's config, or None; a message may have any content."""
    record = message.content.get("config")
    return record.get(name) if isinstance(record, ConfigRecord) else None
