"""Groups of prompts: how alike they are, and which of them travel (FedMGP, arXiv 2511.00480)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pfedmoap_flwr.methods.base import PromptHead

WORDS_STD = 0.01


class Groups(nn.Module):
    """A client's own prompts (G, ...) of each kind, and copies of `count` of them, common to all.

    places_KIND (count,): which of its own the common ones stand for.
    """

    def __init__(self, prompts: Mapping[str, Tensor], count: int) -> None:
        super().__init__()
        starts = {kind: start.detach() for kind, start in prompts.items()}
        self.own = nn.ParameterDict(starts)
        self.common = nn.ParameterDict({k: start[:count].clone() for k, start in starts.items()})
        for kind, common in self.common.items():
            places = torch.arange(len(common), device=common.device)
            self.register_buffer(f"places_{kind}", places)

    @torch.no_grad()
    def receive(self) -> None:
        """Put the common prompts in their places."""
        for kind, common in self.common.items():
            self.own[kind][self.get_buffer(f"places_{kind}")] = common

    @torch.no_grad()
    def choose(self, temperature: float, generator: torch.Generator, *, alike: bool) -> None:
        """Draw those that travel, the likelier the nearer they are to the common; or all `alike`.

        p_j = softmax(max_i cos(P_j, common_i) / temperature), without replacement, by kind.
        """
        for kind, common in self.common.items():
            own = self.own[kind]
            near = torch.zeros(len(own)) if alike else nearness(own, common)
            places = draw(near, len(common), temperature, generator).to(own.device)
            self.get_buffer(f"places_{kind}").copy_(places)
            common.copy_(own[places])


def several(head: PromptHead, count: int, *, words: bool) -> Tensor:
    """Return `count` prompts to start from (G, ...): the head's own `ctx`, and others drawn.

    words: `ctx` starts from words, and so do the others, with noise of 0.01.
    """
    std, start = (WORDS_STD if words else 0.02), head.ctx.detach() * words
    drawn = [head.normal(f"group {j}", *head.ctx_shape, std=std) for j in range(1, count)]
    return torch.stack([head.ctx.detach(), *(start + group.detach() for group in drawn)])


def likeness(text: Tensor, images: Tensor | None = None, counted: Tensor | None = None) -> Tensor:
    """Return the mean cosine () between groups' unit features; 0 for one group.

    text (G, C, d); with images (G, B, d), of which those `counted` (B,), the mean of both means.
    """
    if images is not None:
        return (likeness(text) + likeness(images, None, counted)) / 2
    first, second = torch.triu_indices(len(text), len(text), offset=1)
    cosines = (text[first] * text[second]).sum(-1)
    if counted is None:
        return cosines.sum() / max(1, cosines.numel())
    return (cosines * counted).sum() / (max(1, len(first)) * counted.sum()).clamp_min(1)


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
