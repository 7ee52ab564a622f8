"""FedJETs (Dun et al., arXiv 2306.08586): the server's experts, a few of them for each client.

An expert is a prompt. What the gate reads, the paper's common expert, is the frozen image feature
(`parts/experts.py`):

    p(y | x) over the K experts that came: logits = SUM_k softmax(s gate x)_k logits_k

Once trained, a client's image is classified by the one expert that its gate prefers. In
the first rounds, if anchors are asked for, a client trains one expert alone, and the gate to prefer
it.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pfedmoap_flwr.methods.base import (
    Deliveries,
    Method,
    Phase,
    ServerState,
    Tensors,
    Upload,
    Work,
)
from pfedmoap_flwr.methods.parts.experts import GatedExperts
from pfedmoap_flwr.settings import Section, setting


class FedJETsSettings(Section):
    """Settings of FedJETs."""

    num_experts: int = setting(5, "experts M on the server", low=1)
    top: int = setting(2, "experts K that a client gets to train; M where it is more", low=1)
    anchor_rounds: int = setting(0, "first rounds, in which a client trains one expert", low=0)


class FedJETs(Method[FedJETsSettings, GatedExperts]):
    """A client says how its gate ranks all experts; the best K are what it trains next."""

    section = FedJETsSettings
    head = GatedExperts
    fidelity = "nearest version: the gate is asked with the last round's ranks"

    def reports(self) -> dict[str, Tensor]:
        """Return `ranks` (M,): the gate's mean softmax over a client's training images."""
        return {"ranks": torch.zeros(self.own.num_experts)}

    def loss(
        self, head: GatedExperts, features: Tensor, labels: Tensor, received: Tensors
    ) -> Tensor:
        """Return cross-entropy, and that of an anchor's gate to its own expert."""
        plain = super().loss(head, features, labels, received)
        if "anchor" not in received:
            return plain
        return plain + head.loss_of_gate(features, labels, received["anchor"])

    def schedule(self, head: GatedExperts, epochs: int) -> list[Phase]:
        """Return one phase: the gate and the experts in use."""
        return [(epochs, ("gate", *(f"experts.{i}" for i in head.which.tolist())))]

    @torch.no_grad()
    def upload(self, work: Work[GatedExperts]) -> dict[str, Tensor]:
        """Return the gate, the experts that came, and the ranks of all."""
        ranks = work.head.scores(work.images.features).softmax(-1).mean(0)
        return super().upload(work) | {"ranks": ranks.cpu()}

    def send(self, state: ServerState, client_ids: Sequence[int], *, train: bool) -> Deliveries:
        """Return the gate and each client's K experts, or all of them to be measured."""
        sent = {}
        for client_id in client_ids:
            which = self.choose(state, client_id) if train else list(range(self.own.num_experts))
            names = ["gate", *(f"experts.{i}" for i in which)]
            sent[client_id] = {name: state.shared[name] for name in names}
            sent[client_id]["which"] = torch.tensor(which)
            if train and state.round < self.own.anchor_rounds:
                sent[client_id]["anchor"] = torch.tensor(which)
        return sent

    def choose(self, state: ServerState, client_id: int) -> list[int]:
        """Return the experts that a client ranked highest; for a newcomer they are drawn.

        An anchor gets one. The server knows nobody's labels: it deals clients out by number.
        """
        if state.round < self.own.anchor_rounds:
            return [client_id % self.own.num_experts]
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
