"""IncFL / MaxFL (Cho et al., TMLR 2024, arXiv 2205.14840): as many clients as possible gain.

A client gains if the common prompt w has a lower loss F_k(w) on its images than rho_k, that of a
prompt which it trained by itself. The server maximises SUM_k sigmoid(T (rho_k - F_k(w))):

    q_k = T s_k (1 - s_k),  s_k = sigmoid(T (F_k(w) - rho_k))
    w <- w - eta_g / (SUM_k q_k + eps) SUM_k q_k (w - w_k)

"softplus" minimises SUM_k log(1 + exp(F_k(w) - rho_k)) instead: q_k = sigmoid(F_k(w) - rho_k).
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from pfedmoap_flwr.methods.base import Method, PromptHead, ServerState, Split, Upload, Work
from pfedmoap_flwr.settings import Section, setting


class IncFLSettings(Section):
    """Settings of IncFL."""

    weight: Literal["sigmoid", "softplus"] = setting(
        "sigmoid", "a client counts most near its own loss, or the more the worse it is"
    )
    temperature: float = setting(10.0, "T of the sigmoid weight", above=0)
    eta_g: float = setting(1.0, "the server's step", above=0)
    eps: float = setting(1e-8, "added to the sum of q, which may vanish", above=0)


class IncFLHead(PromptHead):
    """The prompt, and `rho` (), the loss that the client reached alone; infinite before that."""

    rho: Tensor

    def __init__(self, method: "IncFL") -> None:
        super().__init__(method)
        self.register_buffer("rho", torch.tensor(torch.inf, device=self.device))


class IncFL(Method[IncFLSettings, IncFLHead]):
    """Trains as PromptFL; a client's weight follows from the losses that it reports."""

    section = IncFLSettings
    head = IncFLHead

    def reports(self) -> dict[str, Tensor]:
        """Return `loss` (), F_k of the prompt that came, and `rho` ()."""
        return {"loss": torch.zeros(()), "rho": torch.zeros(())}

    def upload(self, work: Work[IncFLHead]) -> dict[str, Tensor]:
        """Return the prompt, F_k and rho; a client's first local training is its warm-up."""
        came = self.build()
        came.load(work.received)
        if work.head.rho.isinf():
            work.head.rho = mean_loss(work.head, work.images)
        losses = {"loss": mean_loss(came, work.images), "rho": work.head.rho.clone()}
        return super().upload(work) | {name: loss.cpu() for name, loss in losses.items()}

    def merge(self, state: ServerState, uploads: Mapping[int, Upload]) -> None:
        """Take the step, and log the sum of q and the share of clients that w was better for."""
        sent = [uploads[i].tensors for i in sorted(uploads)]
        loss, rho = (torch.stack([t[name] for t in sent]).double() for name in ("loss", "rho"))
        q = weights(loss, rho, self.own.temperature if self.own.weight == "sigmoid" else None)
        rate = self.own.eta_g / (q.sum() + self.own.eps)
        for name, w in state.shared.items():
            apart = w.double() - torch.stack([t[name] for t in sent]).double()
            state.shared[name] = (w - rate * torch.tensordot(q, apart, dims=1)).to(w.dtype)
        state.metrics |= {"sum-q": q.sum().item(), "appeal": (loss < rho).double().mean().item()}


def weights(loss: Tensor, rho: Tensor, temperature: float | None) -> Tensor:
    """Return q (N,) of F_k(w) and rho_k (N,); None: the softplus weight."""
    if temperature is None:
        return torch.sigmoid(loss - rho)
    z = temperature * (loss - rho)
    # 1 - s would lose all digits where s is near 1
    return temperature * torch.sigmoid(z) * torch.sigmoid(-z)


@torch.no_grad()
def mean_loss(head: PromptHead, images: Split) -> Tensor:
    """Return the cross-entropy () over all images of a client."""
    return F.cross_entropy(head.predict(images.features, head.encode()), images.labels)
