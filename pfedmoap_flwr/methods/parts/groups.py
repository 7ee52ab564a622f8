"""Groups of prompts: how alike they are, and which of them are drawn (FedMGP, arXiv 2511.00480)."""

import torch
from torch import Tensor
from torch.nn import functional as F


def likeness(encoded: Tensor) -> Tensor:
    """Return the mean cosine () between groups' text features (G, C, d), unit-norm; 0 for one."""
    first, second = torch.triu_indices(len(encoded), len(encoded), offset=1)
    return (encoded[first] * encoded[second]).sum(-1).sum() / max(1, len(first) * encoded.shape[1])


def nearness(groups: Tensor, common: Tensor) -> Tensor:
    """Return each group's largest cosine (G,), prompts (G, ...) and (s, ...) taken as vectors."""
    rows, others = (F.normalize(prompts.flatten(1), dim=-1) for prompts in (groups, common))
    return (rows @ others.t()).amax(-1)


def draw(near: Tensor, count: int, temperature: float, generator: torch.Generator) -> Tensor:
    """Return `count` places, in the order drawn, one after the other from those that are left.

    Each is drawn by softmax(near / temperature) over what is left; near (G,).
    """
    left, places = list(range(len(near))), []
    for _ in range(count):
        chances = (near.cpu()[left] / temperature).softmax(-1)
        places.append(left.pop(int(torch.multinomial(chances, 1, generator=generator))))
    return torch.tensor(places)
