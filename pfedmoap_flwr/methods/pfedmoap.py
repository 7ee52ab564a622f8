"""pFedMoAP (Luo, Chen, Wu, ICLR 2025, arXiv 2410.10114): a mixture of adaptive prompts.

The server lends every client the K prompts of its pool that lie nearest to the client's own; an
attention gate, which never leaves the client, mixes local and borrowed text features per image.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pfedmoap_flwr.clip.load import FrozenClip
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.base import Head, Method, PromptHead, Received, Server, Task
from pfedmoap_flwr.methods.parts.pool import select_experts
from pfedmoap_flwr.randomness import torch_generator
from pfedmoap_flwr.settings import Section, setting

RELEASED_SCORE_SCALE = 10.0


class PFedMoAPSettings(Section):
    """Settings of the paper's Section 4.1."""

    num_experts: int = setting(9, "borrowed prompts K; 0: gate over the local prompt only", low=0)
    selection: Literal["knn", "random", "farthest"] = setting("knn", "which prompts of the pool")
    lambda_: float = setting(0.5, "weight of the local logits, Eq. 10", low=0)
    gate: Literal["attention", "none"] = setting("attention", "how features are mixed")
    d_gating: int = setting(128, "width of the gate, a divisor of CLIP's", low=1)
    heads: int = setting(8, "attention heads of the gate, a divisor of d-gating", low=1)
    gate_lr: float = setting(0.01, "learning rate of the gate (SGD)", above=0)
    gate_shared: bool = setting(False, "average the gate like the prompt, as in Table 7's ablation")


class AttentionGate(nn.Module):
    """Eq. 11: multi-head attention of pooled images over pooled experts.

    Scores are divided by sqrt(d_head), or multiplied by `score_scale` where given.
    """

    def __init__(
        self,
        d_gating: int,
        heads: int,
        generator: torch.Generator,
        score_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.score_scale = (d_gating // heads) ** -0.5 if score_scale is None else score_scale
        self.query = _linear(d_gating, generator)
        self.key = _linear(d_gating, generator)
        self.value = _linear(d_gating, generator)
        self.out = _linear(d_gating, generator)

    def forward(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Return T_MoE (B, C, d_gating) of images (B, d_gating) and experts (K+1, C, d_gating)."""
        n_experts = len(text_features)
        split = (self.heads, -1)
        query = self.query(image_features).unflatten(-1, split).movedim(1, 0)
        key = self.key(text_features).flatten(0, 1).unflatten(-1, split).permute(1, 2, 0)
        value = self.value(text_features).unflatten(-1, split).permute(2, 1, 0, 3)
        # Classes innermost: (heads, B, K+1, C) is one product and a softmax over whole rows
        scores = (self.score_scale * query @ key).unflatten(-1, (n_experts, -1))
        weights = scores.softmax(dim=2)
        mixed = weights.permute(0, 3, 1, 2) @ value
        return self.out(mixed.permute(2, 1, 0, 3).flatten(-2))


class PFedMoAPHead(PromptHead):
    """Local prompt, gate, and the experts of the last delivery (None: plain prompt training)."""

    experts: Tensor | None
    expert_features: Tensor | None

    def __init__(self, clip: FrozenClip, task: Task, settings: Any) -> None:
        super().__init__(clip, task.classnames, settings)
        own: PFedMoAPSettings = settings.own
        self.released = settings.compat == "released"
        self.lambda_ = own.lambda_
        self.d_gating = own.d_gating
        self.gate: AttentionGate | None = None
        self.register_buffer("experts", None)
        self.register_buffer("expert_features", None, persistent=False)
        if own.gate == "attention":
            _check_widths(own, self.encoder.embed_dim)
            generator = torch_generator(settings.seed, "gate")
            scale = RELEASED_SCORE_SCALE if self.released else None
            self.gate = AttentionGate(own.d_gating, own.heads, generator, scale).to(clip.device)

    def receive(self, tensors: Received) -> None:
        """Overwrite by name. Experts last for one delivery: a first-timer has none (footnote 1)."""
        super().receive(tensors)
        experts = tensors.get("experts")
        self.experts = None if experts is None else experts.detach().clone().to(self.ctx.device)
        self.expert_features = None

    @torch.no_grad()
    def prepare(self) -> None:
        """Encode the experts, which stay fixed: pooled T_NL (K, C, d_gating) of Eq. 8."""
        if self.gate is not None and self.experts is not None and self.expert_features is None:
            self.expert_features = self.pool(self.encoder(self.experts))

    def encode(self) -> Any:
        """Return T_L (C, d) and, where there is a gate and a delivery, pooled [T_L, T_NL]."""
        self.prepare()
        local = self.encoder(self.ctx)
        if self.expert_features is None:
            return local, None
        return local, torch.cat([self.pool(local).unsqueeze(0), self.expert_features])

    def classify(self, image_features: Tensor, encoded: Any) -> Tensor:
        """Return logits (B, C): Eq. 10 times 1/tau; plain Eq. 3 without experts."""
        local, experts = encoded
        local_logits = image_features @ local.t()
        if self.experts is None:
            return self.logit_scale * local_logits
        logits = self.lambda_ * local_logits
        if self.gate is not None:
            query = self.pool(image_features)
            moe = self.gate(query, experts)
            mixture_logits = torch.einsum("bd,bcd->bc", query, moe)
            if not self.released:
                mixture_logits = mixture_logits / moe.norm(dim=-1).clamp_min(1e-12)
            logits = logits + mixture_logits
        return self.logit_scale * logits

    def pool(self, features: Tensor) -> Tensor:
        """Return features (..., d) as (..., d_gating).

        "paper": average over neighbouring entries, then unit length, so that sim stays a cosine.
        "released": every (d / d_gating)-th entry, not normalised again.
        """
        groups = features.unflatten(-1, (self.d_gating, -1))
        return groups[..., 0] if self.released else F.normalize(groups.mean(-1), dim=-1)


class PFedMoAP(Method):
    """Alg. 1: P_g and the K experts down; prompt and gate trained jointly; only the prompt up."""

    section = PFedMoAPSettings
    personal: tuple[str, ...] = ("gate",)

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        if self.own.gate_shared:
            self.personal = ()

    def build(self, clip: FrozenClip, task: Task) -> Head:
        """Return the prompt with its gate."""
        return PFedMoAPHead(clip, task, self.settings)

    def lr(self, name: str, epoch: int, epochs: int) -> float:
        """Return the gate's own constant rate, or the prompt's."""
        of_gate = name.startswith("gate.")
        return self.own.gate_lr if of_gate else super().lr(name, epoch, epochs)

    def send(self, server: Server, client: int, *, train: bool) -> dict[str, Tensor]:
        """Return what `deliveries` yields for one client."""
        return dict(self.deliveries(server, [client], train=train))[client]

    def deliveries(
        self, server: Server, clients: Sequence[int], *, train: bool
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yield P_g and, for a client with a pool entry, the experts (K, M, D) to train with.

        The pool is the one of the start of the round: `merge` alone writes it, at the end.
        """
        prompts = {i: entry["ctx"] for i, entry in server.pool.items()}
        borrowers = [client for client in clients if train and client in prompts]
        chosen = select_experts(
            prompts,
            borrowers,
            self.own.num_experts,
            self.own.selection,
            lambda i: torch_generator(self.settings.seed, "experts", server.round + 1, i),
        )
        for client in clients:
            sent = super().send(server, client, train=train)
            if client in chosen:
                experts = [prompts[i] for i in chosen[client]]
                empty = prompts[client].new_empty((0, *prompts[client].shape))
                sent["experts"] = torch.stack(experts) if experts else empty
            yield client, sent


def _linear(width: int, generator: torch.Generator) -> nn.Linear:
    """Return nn.Linear as it starts by itself, drawn by a generator of one's own."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, width, width)
    bound = width**-0.5
    for parameter in (layer.weight, layer.bias):
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return layer


def _check_widths(own: PFedMoAPSettings, embed_dim: int) -> None:
    if embed_dim % own.d_gating:
        raise UsageError(
            f"setting pfedmoap.d-gating={own.d_gating}: must divide CLIP's width {embed_dim}"
        )
    if own.d_gating % own.heads:
        raise UsageError(
            f"setting pfedmoap.heads={own.heads}: must divide pfedmoap.d-gating={own.d_gating}"
        )
