"""FedSEPT (Wang et al., ACM MM 2026): low-rank prompt experts and a router for each image.

Expert m is the context A_m B0 + R. Its factor A_m (M, r) is shared, the basis B0 (r, D) is fixed
and the same for all, the residual R (M, D) never leaves the client. The router is personal too:

    pi(x) = softmax(Linear(LayerNorm(W_o (W_v x + b_v) + b_o)))
    logit^(c) = SUM_m pi_m(x) logit_scale x . text_features_m^(c)
    loss = CE + lambda mean_{i != j} cos^2(A_i, A_j)

If it is to be private, each image's gradient of A is clipped to the length `clip`, and their sum
gets N(0, (noise clip)^2) in every entry.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pfedmoap_flwr.methods.base import Method, PromptHead, Tensors, Work
from pfedmoap_flwr.methods.parts.gate import linear
from pfedmoap_flwr.methods.parts.privacy import privatised
from pfedmoap_flwr.randomness import torch_generator
from pfedmoap_flwr.settings import Section, setting


class FedSEPTSettings(Section):
    """Settings of FedSEPT."""

    num_experts: int = setting(4, "prompt experts", low=2)
    rank: int = setting(16, "rank r of an expert", low=1)
    diversity: float = setting(10.0, "weight lambda of what holds experts apart", low=0)
    private: bool = setting(False, "per-sample differential privacy of what is shared")
    clip: float = setting(1.0, "private: longest gradient of one image", above=0)
    noise: float = setting(1.0, "private: noise multiplier", low=0)


class Router(nn.Module):
    """A learned query's attention to one token, which is that token's value whatever the query."""

    def __init__(self, width: int, n_experts: int, generator: torch.Generator) -> None:
        super().__init__()
        self.value = linear(width, width, generator)
        self.out = linear(width, width, generator)
        self.norm = nn.LayerNorm(width)
        self.head = linear(width, n_experts, generator)
        nn.init.normal_(self.head.weight, std=0.01, generator=generator)
        nn.init.zeros_(self.head.bias)

    def forward(self, image_features: Tensor) -> Tensor:
        """Return pi (B, experts) of unit-norm image features (B, d)."""
        return self.head(self.norm(self.out(self.value(image_features)))).softmax(-1)


class FedSEPTHead(PromptHead):
    """`factors` (experts, M, r) are shared; `residual` (M, D) and the router are the client's."""

    draws: torch.Generator

    def __init__(self, method: "FedSEPT") -> None:
        super().__init__(method)
        own, (*lead, width) = method.own, self.ctx_shape
        del self.ctx
        self.basis = self.normal("basis", own.rank, width).detach()
        self.factors = self.normal("factors", own.num_experts, *lead, own.rank)
        self.residual = nn.Parameter(torch.zeros(self.ctx_shape, device=self.device))
        generator = torch_generator(self.seed, "router")
        self.router = Router(self.encoder.embed_dim, own.num_experts, generator).to(self.device)

    def encode(self) -> Tensor:
        """Return text features (experts, C, d)."""
        return self.encoder(self.factors @ self.basis + self.residual)

    def classify(self, image_features: Tensor, encoded: Tensor) -> Tensor:
        """Return logits (B, C) of image features (B, d)."""
        x = F.normalize(image_features, dim=-1)
        return self.logit_scale * torch.einsum("bm,bd,mcd->bc", self.router(x), x, encoded)


class FedSEPT(Method[FedSEPTSettings, FedSEPTHead]):
    """The factors alone travel, and their gradient can be made private."""

    section = FedSEPTSettings
    head = FedSEPTHead
    personal = ("residual", "router")

    def prepare(self, work: Work[FedSEPTHead]) -> None:
        """Give the head its source of noise."""
        work.head.draws = self.generator("noise", work.client_id, work.round)

    def loss(
        self, head: FedSEPTHead, features: Tensor, labels: Tensor, received: Tensors
    ) -> Tensor:
        """Return cross-entropy and the experts' overlap."""
        own, overlap = self.own, self.own.diversity * mean_overlap(head.factors)
        if not own.private:
            return super().loss(head, features, labels, received) + overlap
        losses = F.cross_entropy(head(features), labels, reduction="none")[labels >= 0] + overlap
        return privatised(losses, head.factors, own.clip, own.noise, head.draws)


def mean_overlap(factors: Tensor) -> Tensor:
    """Return the mean squared cosine of all pairs of different experts (experts, ...)."""
    unit = F.normalize(factors.flatten(1), dim=-1)
    squared = (unit @ unit.t()).square()
    return (squared.sum() - squared.trace()) / (squared.numel() - len(factors))
