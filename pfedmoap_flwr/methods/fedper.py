"""Prompt + FedPer (Arivazhagan et al., 2019, arXiv 1912.00818): the last context tokens stay.

P = [ctx; local]: the first tokens of the context are averaged, the others never leave their client,
and all are trained together.
"""

import torch
from torch import Tensor, nn

from pfedmoap_flwr.methods.base import Method, PromptHead
from pfedmoap_flwr.settings import Section, setting


class FedPerSettings(Section):
    """Settings of FedPer."""

    shared_fraction: float = setting(
        0.5, "share of the context tokens that is averaged; 1: PromptFL, 0: CoOp", low=0, high=1
    )


class FedPerHead(PromptHead):
    """The first n tokens `ctx` (n, D) and the others `local` (M - n, D); n or M - n may be 0.

    They start as one prompt, cut in two. Where the share of M is no whole number, n is the nearest,
    and of two equally near the larger.
    """

    def __init__(self, method: "FedPer") -> None:
        super().__init__(method)
        n_ctx = self.ctx.shape[-2]
        shared = int(method.own.shared_fraction * n_ctx + 0.5)
        first, rest = self.ctx.detach().split([shared, n_ctx - shared], dim=-2)
        self.ctx = nn.Parameter(first.clone())
        self.local = nn.Parameter(rest.clone())

    def encode(self) -> Tensor:
        """Return text features (C, d) of the whole context."""
        return self.encoder(torch.cat([self.ctx, self.local], dim=-2))


class FedPer(Method[FedPerSettings, FedPerHead]):
    """The shared tokens are averaged, the personal ones stay."""

    section = FedPerSettings
    head = FedPerHead
    personal = ("local",)
    fidelity = "faithful: which tokens are personal is public code's choice"
