"""FedOTP (Li et al., CVPR 2024, arXiv 2403.00041): transport between patches and two prompts.

logit^(c) = SUM_mn T_mn sim_mn / tau, where sim_mn is the cosine of patch m and of prompt n's text
feature of class c, and the plan T carries no gradient.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from pfedmoap_flwr.clip.features import Reading
from pfedmoap_flwr.methods.base import Method, PromptHead
from pfedmoap_flwr.methods.parts.sinkhorn import transport_plan
from pfedmoap_flwr.settings import Section, setting


class FedOTPSettings(Section):
    """Settings of FedOTP."""

    eps: float = setting(0.1, "weight of the plan's entropy", above=0)
    gamma: float = setting(0.8, "share of the patches that is transported", above=0, high=1)
    iterations: int = setting(100, "of the scaling that finds the plan", low=1)


class FedOTPHead(PromptHead):
    """The global prompt `ctx` and the client's `local` one."""

    def __init__(self, method: "FedOTP") -> None:
        super().__init__(method)
        self.own = method.own
        self.local = self.normal("local", *self.ctx_shape)

    def encode(self) -> Tensor:
        """Return text features (2, C, d) of the global and the local prompt."""
        return self.encoder(torch.stack([self.ctx, self.local]))

    def classify(self, image_features: Tensor, encoded: Tensor) -> Tensor:
        """Return logits (B, C) of tokens (B, 1 + M, d), the patches behind the image's own."""
        patches = F.normalize(image_features[:, 1:], dim=-1)
        similarity = torch.einsum("bmd,ncd->bcmn", patches, encoded)
        own = self.own
        plan = transport_plan(similarity.detach(), own.eps, own.gamma, own.iterations)
        return self.logit_scale * (plan * similarity).sum((-2, -1))


class FedOTP(Method[FedOTPSettings, FedOTPHead]):
    """The global prompt is averaged, the local one stays; both are trained together."""

    section = FedOTPSettings
    head = FedOTPHead
    reading = Reading("tokens")
    personal = ("local",)
    fidelity = "faithful with patch tokens"
