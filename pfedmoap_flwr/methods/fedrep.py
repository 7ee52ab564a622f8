"""FedRep (Collins et al., ICML 2021, arXiv 2102.07078): a shared prompt, a head for each client.

The representation is the prompt P, which is averaged. The head is a residual R (C, d) of the text
features, which never leaves its client and starts at 0:

    logit^(c) = logit_scale cos(x, T_c) + x . R_c

A client trains its head first, with P as it came, and then P, with its head as it is now. What the
paper's last round does, heads alone on the last P, a client does whenever it is measured.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pfedmoap_flwr.methods.base import Method, Phase, PromptHead, Work
from pfedmoap_flwr.methods.parts.fine_tuning import fine_tune
from pfedmoap_flwr.settings import Section, setting


class FedRepSettings(Section):
    """Settings of FedRep."""

    rep_epochs: int = setting(2, "local epochs, the last ones, that train the prompt", low=1)
    last_epochs: int = setting(10, "epochs of the head on P_g before it is measured", low=0)
    head_lr: float = setting(1.0, "learning rate of the head (SGD)", above=0)


class FedRepHead(PromptHead):
    """The shared prompt `ctx`, and the client's `residual` (C, d) of the text features."""

    def __init__(self, method: "FedRep") -> None:
        super().__init__(method)
        shape = len(method.task.classnames), self.encoder.embed_dim
        self.residual = nn.Parameter(torch.zeros(shape, device=self.device))

    def classify(self, image_features: Tensor, encoded: Tensor) -> Tensor:
        """Return logits (B, C) of image features (B, d) and text features (C, d)."""
        of_prompt = super().classify(image_features, encoded)
        return of_prompt + F.normalize(image_features, dim=-1) @ self.residual.t()


class FedRep(Method[FedRepSettings, FedRepHead]):
    """First the head, which is personal, then the prompt, which is averaged."""

    section = FedRepSettings
    head = FedRepHead
    personal = ("residual",)
    of_classes = ("residual",)
    fidelity = "faithful: which head a prompt gets is ours"

    def schedule(self, head: FedRepHead, epochs: int) -> list[Phase]:
        """Return the two phases, which share the local epochs."""
        of_prompt = min(self.own.rep_epochs, epochs)
        return [(epochs - of_prompt, ("residual",)), (of_prompt, head.prompt)]

    def lr(self, name: str, epoch: int, epochs: int) -> float:
        """Return the head's rate or the prompt's, both constant, as FedRep's code has them."""
        return self.own.head_lr if name == "residual" else self.settings.lr

    def sgd_options(self) -> dict[str, Any]:
        """Return momentum and weight decay; "released": those of FedRep's code."""
        released = self.settings.compat == "released"
        return {"momentum": 0.5, "weight_decay": 1e-4} if released else {}

    def adapt(self, work: Work[FedRepHead]) -> None:
        """Train the head alone, on P_g, whose text features are computed once."""
        head = work.head
        head.load(work.received)
        texts = head.encode().detach()

        def loss_of(features: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(head.classify(features, texts), labels)

        fine_tune(self, work, ("residual",), self.own.last_epochs, loss_of)
