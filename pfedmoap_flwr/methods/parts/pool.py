"""The server's prompt pool: which K experts each client borrows (pFedMoAP, Alg. 1)."""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from pfedmoap_flwr.methods.parts.nearest import nearest

Selection = Literal["knn", "random", "farthest", "cosine"]


def select_experts(
    pool: Mapping[int, Tensor],
    clients: Sequence[int],
    num_experts: int,
    selection: Selection,
    generator: Callable[[int], torch.Generator],
) -> dict[int, list[int]]:
    """Return the ids whose prompts each client borrows: K of them, or all others where fewer.

    knn: nearest to the client's own old entry by the l2 distance between prompts (Alg. 1: Q_i over
    pool_{t-1}); farthest: the reverse; cosine: nearest by direction alone; random: drawn by
    `generator(client)`, uniformly, without repeats. Nearest (farthest) first, ties broken by the
    lower id. A client never gets itself.

    Raises KeyError where a client has no entry yet.
    """
    if selection == "cosine":
        # The nearest of unit-norm prompts have the greatest cosines
        pool = {i: F.normalize(prompt.double().flatten(), dim=0) for i, prompt in pool.items()}
    if selection != "random":
        return nearest(pool, clients, num_experts, farthest=selection == "farthest")
    ids = sorted(pool)
    chosen = {}
    for client in clients:
        if client not in pool:
            raise KeyError(client)
        own = bisect_left(ids, client)
        drawn = torch.randperm(len(ids) - 1, generator=generator(client))[:num_experts].tolist()
        chosen[client] = [ids[i + (i >= own)] for i in drawn]
    return chosen


def spread(pool: Mapping[int, Tensor]) -> float:
    """Return the root of the mean squared distance between two prompts of a pool; 0 of one.

    By sum_ij |p_i - p_j|^2 = 2 N sum_i |p_i - mean|^2: once over the pool, whatever its size. Six
    digits, so that the number of threads does not show.
    """
    count = len(pool)
    if count < 2:
        return 0.0
    mean = torch.zeros_like(next(iter(pool.values())), dtype=torch.float64)
    for i in sorted(pool):
        mean += pool[i].double() / count
    apart = sum(float((pool[i].double() - mean).square().sum()) for i in sorted(pool))
    return float(f"{(2 * apart / (count - 1)) ** 0.5:.6g}")
