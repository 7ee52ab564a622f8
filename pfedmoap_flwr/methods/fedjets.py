"""FedJETs (Dun et al., arXiv 2306.08586): the server's experts, a few of them for each client.

An expert is a prompt. What the gate reads, the paper's common expert, is the frozen image feature:

    p(y | x) over the K experts that came: logits = SUM_k softmax(s gate x)_k logits_k

Once trained, a client's image is classified by the one expert that its gate prefers.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pfedmoap_flwr.methods.base import (
    Deliveries,
    Method,
    Phase,
    PromptHead,
    ServerState,
    Upload,
    Work,
)
from pfedmoap_flwr.settings import Section, setting


class FedJETsSettings(Section):
    """Settings of FedJETs."""

    num_experts: int = setting(5, "experts M on the server", low=1)
    top: int = setting(2, "experts K that a client gets to train; M where it is more", low=1)


class FedJETsHead(PromptHead):
    """All M experts and the gate; `which` (K,) says which experts this client has in use."""

    which: Tensor

    def __init__(self, method: "FedJETs") -> None:
        super().__init__(method)
        n_experts = method.own.num_experts
        del self.ctx
        self.experts = nn.ParameterList(
            self.normal(f"expert {i}", *self.ctx_shape) for i in range(n_experts)
        )
        self.gate = self.normal("gate", n_experts, self.encoder.embed_dim)
        self.register_buffer("which", torch.arange(n_experts, device=self.device))

    def encode(self) -> Tensor:
        """Return text features (K, C, d) of the experts in use."""
        return self.encoder(torch.stack(list(self.experts))[self.which])

    def classify(self, image_features: Tensor, encoded: Tensor) -> Tensor:
        """Return logits (B, C): the gate's mixture in training, its best expert's afterwards."""
        image_features = F.normalize(image_features, dim=-1)
        weights = self.weights(image_features)[:, self.which]
        if self.training:
            weights = weights / weights.sum(-1, keepdim=True)
        else:
            weights = F.one_hot(weights.argmax(-1), weights.shape[-1]).to(weights)
        return self.logit_scale * torch.einsum("bk,bd,kcd->bc", weights, image_features, encoded)

    def weights(self, image_features: Tensor) -> Tensor:
        """Return the gate's softmax (B, M) over all experts of unit-norm images (B, d)."""
        return (self.logit_scale * image_features @ self.gate.t()).softmax(-1)


class FedJETs(Method[FedJETsSettings, FedJETsHead]):
    """A client says how its gate ranks all experts; the best K are what it trains next."""

    section = FedJETsSettings
    head = FedJETsHead
    fidelity = "nearest version: the gate is asked with the last round's ranks"

    def reports(self) -> dict[str, Tensor]:
        """Return `ranks` (M,): the gate's mean softmax over a client's training images."""
        return {"ranks": torch.zeros(self.own.num_experts)}

    def schedule(self, head: FedJETsHead, epochs: int) -> list[Phase]:
        """Return one phase: the gate and the experts in use."""
        return [(epochs, ("gate", *(f"experts.{i}" for i in head.which.tolist())))]

    @torch.no_grad()
    def upload(self, work: Work[FedJETsHead]) -> dict[str, Tensor]:
        """Return the gate, the experts that came, and the ranks of all."""
        ranks = work.head.weights(F.normalize(work.images.features, dim=-1)).mean(0)
        return super().upload(work) | {"ranks": ranks.cpu()}

    def send(self, state: ServerState, client_ids: Sequence[int], *, train: bool) -> Deliveries:
        """Return the gate and each client's K experts, or all of them to be measured."""
        sent = {}
        for client_id in client_ids:
            which = self.choose(state, client_id) if train else list(range(self.own.num_experts))
            names = ["gate", *(f"experts.{i}" for i in which)]
            sent[client_id] = {name: state.shared[name] for name in names}
            sent[client_id]["which"] = torch.tensor(which)
        return sent

    def choose(self, state: ServerState, client_id: int) -> list[int]:
        """Return the experts that a client ranked highest; for a newcomer they are drawn."""
        if client_id in state.pool:
            order = state.pool[client_id]["ranks"].argsort(descending=True, stable=True)
        else:
            generator = self.generator("anchor", client_id, 0)
            order = torch.randperm(self.own.num_experts, generator=generator)
        return sorted(order[: self.own.top].tolist())

    def merge(self, state: ServerState, uploads: Mapping[int, Upload]) -> None:
        """Average the gate over all, and each expert over those who trained it."""
        super().merge(state, uploads)
        state.pool |= {i: {"ranks": upload.tensors["ranks"]} for i, upload in uploads.items()}
