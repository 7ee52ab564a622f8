"""CLIP's own loss within a batch (Radford et al., ICML 2021), as FedCLIP and Fed-MP use it."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

SameClass = Literal["negative", "ignored"]
"""What two images of one class in a batch are to each other."""


def in_batch(logits: Tensor, labels: Tensor, same_class: SameClass) -> Tensor:
    """Return (CE(S, i) + CE(S', i)) / 2 of logits (B, C), S_ij of image i and the text for j.

    Rows whose label (B,) is below 0 are nobody's negatives.
    """
    missing, pairs = labels < 0, logits[:, labels.clamp(min=0)]
    own = torch.arange(len(labels), device=labels.device)
    hidden = missing.expand(len(labels), -1)
    if same_class == "ignored":
        hidden = hidden | (labels == labels[:, None]) & (own != own[:, None])
    targets = own.masked_fill(missing, -100)
    both = [p.masked_fill(hidden, -torch.inf) for p in (pairs, pairs.t())]
    return (F.cross_entropy(both[0], targets) + F.cross_entropy(both[1], targets)) / 2
