"""FedMGP (Bo et al., NeurIPS 2025, arXiv 2511.00480): groups of prompts, a few of which are shared.

A client has G groups, each a prompt and so a classifier with text features T_j (C, d):

    loss = mean_j CE_j + lambda mean over pairs i < j and classes of cos(T_i, T_j)
    logits = mean_j logits_j

It gets s common groups and uploads s of its own, drawn without replacement by

    p_j = softmax(max_i cos(P_j, common_i) / temperature)

The server averages those that were drawn first, those drawn second, and so on. At the client the
result takes the places of the groups that it had uploaded.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pfedmoap_flwr.methods.base import (
    Method,
    Phase,
    PromptHead,
    ServerState,
    Tensors,
    Upload,
    Work,
    average,
)
from pfedmoap_flwr.methods.parts.groups import draw, likeness, nearness
from pfedmoap_flwr.settings import Section, setting

WORDS_STD = 0.01


class FedMGPSettings(Section):
    """Settings of FedMGP."""

    groups: int = setting(5, "prompts G of a client", low=1)
    common: int = setting(2, "groups s that travel; all where it is more", low=1)
    lambda_: float = setting(1.0, "weight of the term that keeps groups apart", low=0)
    temperature: float = setting(1.0, "of the draw: small prefers groups like the common", above=0)


class FedMGPHead(PromptHead):
    """The common groups `ctx` (s, M, D), the client's own `groups` (G, M, D), and their `places`.

    places (s,): which of the client's groups the common ones stand for.
    """

    places: Tensor

    def __init__(self, method: "FedMGP") -> None:
        super().__init__(method)
        own, words = method.own, bool(self.template.starts)
        std, start = (WORDS_STD if words else 0.02), self.ctx.detach() * words
        drawn = [self.normal(f"group {j}", *self.ctx_shape, std=std) for j in range(1, own.groups)]
        groups = [self.ctx, *(start + group for group in drawn)]
        self.groups = nn.Parameter(torch.stack(groups).detach())
        self.ctx = nn.Parameter(self.groups.detach()[: own.common].clone())
        self.register_buffer("places", torch.arange(len(self.ctx), device=self.device))

    def encode(self) -> Tensor:
        """Return text features (G, C, d)."""
        return self.encoder(self.groups)

    def by_group(self, image_features: Tensor, encoded: Tensor) -> Tensor:
        """Return every group's logits (G, B, C)."""
        return torch.stack([PromptHead.classify(self, image_features, text) for text in encoded])

    def classify(self, image_features: Tensor, encoded: Tensor) -> Tensor:
        """Return the mean of the groups' logits (B, C)."""
        return self.by_group(image_features, encoded).mean(0)


class FedMGP(Method[FedMGPSettings, FedMGPHead]):
    """All groups are trained and stay; copies of some travel as `ctx` and are averaged."""

    section = FedMGPSettings
    head = FedMGPHead
    personal = ("groups",)
    fidelity = "faithful for text prompts: the visual half is not here"

    @torch.no_grad()
    def prepare(self, work: Work[FedMGPHead]) -> None:
        """Put the common groups in their places; a kept head has there what it uploaded."""
        work.head.groups[work.head.places] = work.head.ctx

    def schedule(self, head: FedMGPHead, epochs: int) -> list[Phase]:
        """Return one phase: the client's groups."""
        return [(epochs, ("groups",))]

    def loss(self, head: FedMGPHead, features: Tensor, labels: Tensor, received: Tensors) -> Tensor:
        """Return the groups' mean cross-entropy and the term; "released": with the other sign."""
        encoded = head.encode()
        logits = head.by_group(features, encoded)
        plain = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)))
        term = likeness(encoded)
        if self.settings.compat == "released":
            term = 1 - term
        return plain + self.own.lambda_ * term

    @torch.no_grad()
    def upload(self, work: Work[FedMGPHead]) -> dict[str, Tensor]:
        """Return the groups drawn, and note their places; in round 1 all are drawn alike."""
        head = work.head
        near = nearness(head.groups, head.ctx) if work.round > 1 else torch.zeros(self.own.groups)
        generator = self.generator("groups", work.client_id, work.round)
        head.places = draw(near, len(head.ctx), self.own.temperature, generator).to(head.device)
        head.ctx.copy_(head.groups[head.places])
        return super().upload(work)

    def combine(self, state: ServerState, uploads: Mapping[int, Upload]) -> dict[str, Tensor]:
        """Return the mean by n_i; "released": the plain mean."""
        released = self.settings.compat == "released"
        weights = dict.fromkeys(uploads, 1.0) if released else None
        return average(uploads, state.shared, weights)
