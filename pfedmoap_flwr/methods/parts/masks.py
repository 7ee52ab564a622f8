"""Personal sparse masks: who holds which entries, and how a mask changes (DisPFL, ICML 2022).

DisPFL: Dai, Shen, He, Tian, Tao, arXiv 2206.00187. A mask is a tensor of bools, of a weight's
shape; weights are 0 where it is False.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from pfedmoap_flwr.methods.parts.schedules import cosine


def drawn(shape: tuple[int, ...], density: float, generator: torch.Generator) -> Tensor:
    """Return a mask that holds the nearest whole number to `density` of its entries, drawn."""
    mask = torch.zeros(math.prod(shape), dtype=torch.bool)
    order = torch.randperm(len(mask), generator=generator)
    mask[order[: round(density * len(mask))]] = True
    return mask.view(shape)


def mean(weights: Tensor, masks: Tensor) -> Tensor:
    """Return SUM_j w_j / SUM_j m_j (...) of masked weights and masks (N, ...).

    So an entry is the mean of those who hold it, and 0 where nobody does.
    """
    return weights.sum(0) / masks.sum(0).clamp_min(1)


def drop_rate(start: float, turn: int, turns: int) -> float:
    """Return start / 2 (1 + cos(pi t / T)): the share of a mask that is exchanged, 0 from T on."""
    return cosine(start, min(turn, turns), turns)


def pruned(mask: Tensor, weights: Tensor, count: int) -> Tensor:
    """Return a mask without those `count` of its entries whose |w| is the smallest."""
    size = weights.abs().masked_fill(~mask, torch.inf).flatten()
    smallest = size.argsort(stable=True)[:count]
    return mask.flatten().index_fill(0, smallest, False).view(mask.shape)


def regrown(mask: Tensor, gradient: Tensor, count: int) -> Tensor:
    """Return a mask with `count` entries more, those of the largest |gradient| that it lacks."""
    worth = gradient.abs().masked_fill(mask, -1).flatten()
    largest = worth.argsort(descending=True, stable=True)[:count]
    return mask.flatten().index_fill(0, largest, True).view(mask.shape)


def exchanged(mask: Tensor, weights: Tensor, loss: Tensor, rate: float) -> Tensor:
    """Return the next mask: ceil(rate k) of the k entries go, and as many come.

    Where the gradient of the loss () to the weights is largest they come; what just went may come
    back at once.
    """
    (gradient,) = torch.autograd.grad(loss, weights)
    count = math.ceil(rate * int(mask.sum()))
    return regrown(pruned(mask, weights.detach(), count), gradient, count)


def start(weights: Tensor, came: Mapping[str, Tensor], mask: Tensor) -> Tensor:
    """Return what a client begins a round with: m times the mean of its own (...) and what came.

    came: `neighbours` (K, ...), and `masks` (1 + K, ...), the client's own first.
    """
    return mean(torch.cat([weights[None], came["neighbours"]]), came["masks"]) * mask


def relayed(held: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return what a client gets of its own prompt, the first, and its K neighbours'."""
    weights, masks = stacked(held)
    return {"ctx": weights[0], "neighbours": weights[1:], "masks": masks}


def stacked(held: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the prompts `ctx` and the masks `mask` (N, ...) of N clients."""
    return torch.stack([each["ctx"] for each in held]), torch.stack([each["mask"] for each in held])


def near(
    client_id: int, known: Iterable[int], topology: str, count: int, generator: torch.Generator
) -> list[int]:
    """Return whom a client hears of among the known clients, itself never.

    "random": `count` of them, drawn, or all where there are no more. "ring": the next lower and the
    next higher id, round the end. "full": all.
    """
    others = sorted(set(known) - {client_id})
    if topology == "random":
        drawn = torch.randperm(len(others), generator=generator)[:count]
        return sorted(others[place] for place in drawn.tolist())
    if topology == "ring":
        above = sum(other < client_id for other in others)
        circle = others[above:] + others[:above]
        return sorted({*circle[:1], *circle[-1:]})
    return others


class MaskedSGD(torch.optim.Optimizer):
    """Moves one tensor, 0 outside its mask m, by SGD with a masked and clipped gradient.

    g <- m g,  g <- g min(1, clip / ||g||),  w <- w - lr factor (g + decay w)
    """

    def __init__(
        self, groups: ParamsT, mask: Tensor, clip: float, decay: float, factor: float
    ) -> None:
        super().__init__(groups, {"lr": 0.0})
        self.mask, self.clip, self.decay, self.factor = mask, clip, decay, factor

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step."""
        (group,) = self.param_groups
        (weights,) = group["params"]
        gradient = weights.grad * self.mask
        gradient *= self.clip / gradient.norm().clamp_min(self.clip)
        weights.add_(gradient + self.decay * weights, alpha=-group["lr"] * self.factor)
