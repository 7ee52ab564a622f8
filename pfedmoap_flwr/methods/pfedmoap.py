"""pFedMoAP (Luo, Chen, Wu, ICLR 2025, arXiv 2410.10114): a mixture of adaptive prompts.

The server lends every client the K prompts of its pool that lie nearest to the client's own; an
attention gate, which never leaves the client, mixes local and borrowed text features per image.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from pfedmoap_flwr.clip.load import FrozenClip
from pfedmoap_flwr.data.federated import Task
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.base import (
    Deliveries,
    Method,
    Phase,
    PromptHead,
    ServerState,
    Upload,
    Work,
)
from pfedmoap_flwr.methods.parts.gate import AttentionGate, LinearGate
from pfedmoap_flwr.methods.parts.pool import Selection, select_experts, spread
from pfedmoap_flwr.methods.settings import LearningSettings
from pfedmoap_flwr.randomness import torch_generator
from pfedmoap_flwr.settings import Section, setting

RELEASED_SCORE_SCALE = 10.0


class PFedMoAPSettings(Section):
    """Settings of the paper's Section 4.1."""

    num_experts: int = setting(9, "borrowed prompts K; 0: gate over the local prompt only", low=0)
    selection: Literal["knn", "random", "farthest", "cosine", "noise"] = setting(
        "knn", "which prompts of the pool; noise: none of them, drawn like a start"
    )
    pool_max_age: int = setting(
        0,
        "rounds after which a prompt of a client that is away is not lent; 0: it always is",
        low=0,
    )
    lambda_: float = setting(0.5, "weight of the local logits, Eq. 10", low=0)
    gate: Literal["attention", "linear", "none"] = setting("attention", "how features are mixed")
    d_gating: int = setting(128, "width of the gate, a divisor of CLIP's", low=1)
    heads: int = setting(8, "attention heads of the gate, a divisor of d-gating", low=1)
    gate_lr: float = setting(0.01, "learning rate of the gate (SGD)", above=0)
    gate_shared: bool = setting(False, "average the gate like the prompt, as in Table 7's ablation")
    gate_frozen: bool = setting(False, "leave the gate as it starts, a control")
    score_scale: float = setting(0.0, "of attention scores; 0: as compat has it", low=0)
    scale_learned: bool = setting(False, "train the scale of attention scores")
    unit_scores: bool = setting(False, "attention scores are cosines, times the scale")


class PFedMoAPHead(PromptHead):
    """Local prompt, gate, and the prompts that the client last borrowed.

    experts (K, M, D): None before the client has a prompt in the pool (the paper's footnote 1);
    such a client trains the plain prompt. K = 0 is a gate over the local prompt alone.
    """

    experts: Tensor | None
    expert_features: Tensor | None

    def __init__(self, method: "PFedMoAP") -> None:
        super().__init__(method)
        own = method.own
        self.released = method.settings.compat == "released"
        self.lambda_ = own.lambda_
        self.d_gating = own.d_gating
        self.gate: AttentionGate | LinearGate | None = None
        self.register_buffer("experts", None)
        self.register_buffer("expert_features", None, persistent=False)
        if own.gate != "none":
            _check_widths(own, self.encoder.embed_dim)
            self.gate = self._build_gate(own).to(self.device)

    def _build_gate(self, own: PFedMoAPSettings) -> AttentionGate | LinearGate:
        generator = torch_generator(self.seed, "gate")
        if own.gate == "linear":
            return LinearGate(own.d_gating, own.num_experts, generator)
        scale = own.score_scale or (RELEASED_SCORE_SCALE if self.released else None)
        return AttentionGate(
            own.d_gating,
            own.heads,
            generator,
            scale,
            learned=own.scale_learned,
            unit=own.unit_scores,
        )

    def classify(self, image_features: Tensor, encoded: Tensor) -> Tensor:
        """Return logits (B, C) of images (B, d) and T_L (C, d): Eq. 10; Eq. 3 without experts."""
        if self.experts is None:
            return super().classify(image_features, encoded)
        image_features = F.normalize(image_features, dim=-1)
        logits = self.lambda_ * (image_features @ encoded.t())
        if self.gate is not None:
            query, experts = self.reduce(image_features), self.all_experts(encoded)
            logits = logits + self.mixture_logits(query, self.gate(query, experts))
        return self.logit_scale * logits

    def all_experts(self, text_features: Tensor) -> Tensor:
        """Return reduced [T_L, T_NL] (K+1, C, d_gating) of T_L (C, d): Eq. 8."""
        if self.expert_features is None:
            raise RuntimeError("the experts are not encoded yet; that is what `prepare` is for")
        return torch.cat([self.reduce(text_features).unsqueeze(0), self.expert_features])

    def mixture_logits(self, query: Tensor, moe: Tensor) -> Tensor:
        """Return sim(f(x), T_MoE) (B, C) of images (B, d_gating) and T_MoE (B, C, d_gating)."""
        logits = torch.einsum("bd,bcd->bc", query, moe)
        return logits if self.released else logits / moe.norm(dim=-1).clamp_min(1e-12)

    def reduce(self, features: Tensor) -> Tensor:
        """Return features (..., d) as (..., d_gating): the paper's pooling.

        "paper": average over neighbouring entries, then unit length, so that sim stays a cosine.
        "released": every (d / d_gating)-th entry, not normalised again.
        """
        groups = features.unflatten(-1, (self.d_gating, -1))
        return groups[..., 0] if self.released else F.normalize(groups.mean(-1), dim=-1)


class PFedMoAP(Method[PFedMoAPSettings, PFedMoAPHead]):
    """Alg. 1: P_g and the K experts down; prompt and gate trained jointly; only the prompt up."""

    section = PFedMoAPSettings
    head = PFedMoAPHead
    personal: tuple[str, ...] = ("gate",)

    def __init__(
        self, settings: LearningSettings, own: PFedMoAPSettings, clip: FrozenClip, task: Task
    ) -> None:
        super().__init__(settings, own, clip, task)
        if own.gate_shared:
            self.personal = ()

    @torch.no_grad()
    def prepare(self, work: Work[PFedMoAPHead]) -> None:
        """Encode the experts, which stay fixed: reduced T_NL (K, C, d_gating) of Eq. 8."""
        head = work.head
        if head.gate is not None and head.experts is not None:
            head.expert_features = head.reduce(head.encoder(head.experts))

    def schedule(self, head: PFedMoAPHead, epochs: int) -> list[Phase]:
        """Return one phase: prompt and gate together."""
        ((epochs, names),) = super().schedule(head, epochs)
        frozen = self.own.gate_frozen
        return [(epochs, tuple(n for n in names if not (frozen and n.startswith("gate."))))]

    def lr(self, name: str, epoch: int, epochs: int) -> float:
        """Return the gate's own constant rate, or the prompt's."""
        of_gate = name.startswith("gate.")
        return self.own.gate_lr if of_gate else super().lr(name, epoch, epochs)

    def send(self, state: ServerState, client_ids: Sequence[int], *, train: bool) -> Deliveries:
        """Return P_g and, for a client with a prompt in the pool, the experts (K, M, D).

        The pool is the one of the start of the round: `merge` alone writes it, at the end.
        """
        borrowers = [client_id for client_id in client_ids if train and client_id in state.pool]
        sent = super().send(state, client_ids, train=train)
        if self.own.selection == "noise":
            for client_id in borrowers:
                sent[client_id]["experts"] = self._noise(state, client_id)
            return sent
        for client_id, experts in self._experts(state, borrowers, self.own.selection).items():
            sent[client_id]["experts"] = experts
        return sent

    def _experts(
        self, state: ServerState, borrowers: Sequence[int], selection: Selection
    ) -> dict[int, Tensor]:
        """Return the experts (K, M, D) of each borrower; a client that was away chooses too."""
        prompts = {i: entry["ctx"] for i, entry in state.pool.items()}
        age = self.own.pool_max_age
        lent = {i for i, e in state.pool.items() if not age or state.round - int(e["round"]) < age}
        groups = [[i for i in borrowers if i in lent], *([i] for i in borrowers if i not in lent)]
        found = {}
        for group in groups:
            chosen = select_experts(
                {i: prompts[i] for i in (*lent, *group)},
                group,
                self.own.num_experts,
                selection,
                lambda i: torch_generator(self.settings.seed, "experts", state.round + 1, i),
            )
            state.lent |= chosen
            for client_id, ids in chosen.items():
                empty = prompts[client_id].new_empty((0, *prompts[client_id].shape))
                found[client_id] = torch.stack([prompts[i] for i in ids]) if ids else empty
        return found

    def _noise(self, state: ServerState, client_id: int) -> Tensor:
        """Return prompts (K, M, D) that nobody learned, as many as could be borrowed."""
        count = min(self.own.num_experts, len(state.pool) - 1)
        generator = self.generator("noise", client_id, state.round + 1)
        shape = (count, *state.shared["ctx"].shape)
        return torch.empty(shape).normal_(std=0.02, generator=generator)

    def merge(self, state: ServerState, uploads: Mapping[int, Upload]) -> None:
        """Average, and keep each prompt: pool_t[i] <- P_i^t (Eq. 7)."""
        super().merge(state, uploads)
        for client_id, upload in uploads.items():
            newest = torch.tensor(state.round + 1)
            state.pool[client_id] = {"ctx": upload.tensors["ctx"], "round": newest}
        state.metrics["pool-distance"] = spread({i: e["ctx"] for i, e in state.pool.items()})


def _check_widths(own: PFedMoAPSettings, embed_dim: int) -> None:
    if embed_dim % own.d_gating:
        raise UsageError(
            f"setting pfedmoap.d-gating={own.d_gating}: must divide CLIP's width {embed_dim}"
        )
    if own.d_gating % own.heads:
        raise UsageError(
            f"setting pfedmoap.heads={own.heads}: must divide pfedmoap.d-gating={own.d_gating}"
        )
