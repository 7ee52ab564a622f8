"""The server's prompt pool: which K experts a client borrows (pFedMoAP, Alg. 1)."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Selection = Literal["knn", "random", "farthest"]


def select_experts(
    pool: Mapping[int, Tensor],
    client: int,
    num_experts: int,
    selection: Selection,
    generator: torch.Generator,
) -> list[int]:
    """Return the clients whose prompts `client` borrows: K of them, or all others where fewer.

    knn: nearest to the client's own old entry by the l2 distance between prompts (Alg. 1: Q_i over
    pool_{t-1}); farthest: the reverse; random: drawn by `generator`, uniformly, without repeats.
    Nearest (farthest) first, ties broken by the lower client id. A client never gets itself.

    Raises KeyError where the client has no entry yet.
    """
    own = pool[client].flatten().double()
    others = sorted(other for other in pool if other != client)
    if not others:
        return []
    if selection == "random":
        order = torch.randperm(len(others), generator=generator)
    else:
        prompts = torch.stack([pool[other].flatten() for other in others]).double()
        distances = (prompts - own).square().sum(dim=1)
        order = distances.argsort(stable=True, descending=selection == "farthest")
    return [others[i] for i in order[:num_experts].tolist()]
