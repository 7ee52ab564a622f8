"""Text features pulled towards visual prototypes of their classes (FedSPA, ICML 2026)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

TEMPERATURE = 0.01
BATCH = 8


def affinity(images: Tensor, prototypes: Tensor, beta: float) -> Tensor:
    """Return exp(-beta (1 - x . K_c)) (B, C) of unit-norm images (B, d), prototypes K (C, d)."""
    return torch.exp(-beta * (1 - images @ prototypes.t()))


def info_nce(queries: Tensor, keys: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Return the mean of -log softmax_j(cos(q_i, k_j) / temperature) at j = i, for q, k (B, d)."""
    similarity = F.normalize(queries, dim=-1) @ F.normalize(keys, dim=-1).t()
    return F.cross_entropy(similarity / temperature, torch.arange(len(queries)))


def align(
    text_features: Tensor,
    anchors: Tensor,
    prototypes: Sequence[Tensor],
    draws: Sequence[torch.Generator],
    epochs: int,
    lr: float,
    pull: float,
) -> Tensor:
    """Return text features T (C, d) of unit length, trained on the prototypes (C, d) of N clients.

    It minimises InfoNCE(prototype, T of its class) - pull mean_c T_c . anchor_c in batches of 8.
    AdamW's rate falls from `lr` to 0 in a cosine over all steps. A client's own generator of
    `draws` says where its prototypes stand in an epoch: so their order does not depend on how
    clients are numbered.
    """
    trained = text_features.clone().requires_grad_()
    n_classes, rows = len(trained), torch.cat(list(prototypes))
    optimizer = torch.optim.AdamW([trained], lr=lr, eps=1e-4)
    steps = epochs * -(-len(rows) // BATCH)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    places = torch.cat([torch.rand(epochs, n_classes, generator=draw) for draw in draws], dim=1)
    for chosen in (batch for order in places.argsort(1) for batch in order.split(BATCH)):
        near = info_nce(rows[chosen], trained[chosen % n_classes])
        loss = near - pull * (trained * anchors).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return F.normalize(trained.detach(), dim=-1)
