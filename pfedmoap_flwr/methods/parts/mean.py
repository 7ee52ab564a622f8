"""The mean of what clients upload (McMahan et al., AISTATS 2017, arXiv 1602.05629)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pfedmoap_flwr.methods.base import Upload


def average(
    uploads: Mapping[int, Upload],
    old: Mapping[str, Tensor],
    weights: Mapping[int, float] | None = None,
) -> dict[str, Tensor]:
    """Return the mean of uploads under the names of `old`, weighted by n_i or by `weights`.

    A tensor counts for the clients that sent it; what nobody sent keeps its old value. The sum is
    taken in float64 and in client order, so that the order of replies has no say.
    """
    weights = weights or {i: float(upload.num_examples) for i, upload in uploads.items()}
    means = {}
    for name, before in old.items():
        senders = sorted(i for i, upload in uploads.items() if name in upload.tensors)
        total = sum(weights[i] for i in senders)
        mean = torch.zeros(before.shape, dtype=torch.float64)
        for i in senders:
            mean += uploads[i].tensors[name].double() * (weights[i] / total)
        means[name] = mean.to(before.dtype) if senders else before
    return means
