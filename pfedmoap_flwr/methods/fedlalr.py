"""FedLALR (arXiv 2309.09719): local AMSGrad; the prompt, m and v-hat travel and are averaged.

A step (Algorithm 1), without bias correction and without a constant in the denominator:

    m <- b1 m + (1 - b1) g,     v <- b2 v + (1 - b2) g^2
    vhat <- max(vhat, v),       P <- P - lr m / sqrt(vhat)
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from pfedmoap_flwr.methods.base import Method, Phase, PromptHead, ServerState, Upload, Work, average
from pfedmoap_flwr.settings import Section, setting


class FedLALRSettings(Section):
    """Settings of FedLALR."""

    beta1: float = setting(0.9, "of the first moment m", low=0, high=1)
    beta2: float = setting(0.995, "of the second moment v", low=0, high=1)
    eps: float = setting(1e-8, "v-hat starts at its square", above=0)


class FedLALRHead(PromptHead):
    """The prompt and the optimizer's moments, which travel like it; no phase trains the moments."""

    def __init__(self, method: "FedLALR") -> None:
        super().__init__(method)
        self.m = nn.Parameter(torch.zeros_like(self.ctx))
        self.vhat = nn.Parameter(torch.full_like(self.ctx, method.own.eps**2))


class AMSGrad(torch.optim.Optimizer):
    """Moves one tensor P with moments m and v-hat, which it changes in place.

    v stays with the client: it starts at the v-hat that came, as in the public code. From zero it
    could not exceed v-hat for many steps.
    """

    def __init__(
        self, groups: ParamsT, m: Tensor, vhat: Tensor, beta1: float, beta2: float
    ) -> None:
        super().__init__(groups, {"lr": 0.0})
        self.m, self.vhat, self.v = m, vhat, vhat.detach().clone()
        self.beta1, self.beta2 = beta1, beta2

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step."""
        (parameter,) = self.param_groups[0]["params"]
        self.m.lerp_(parameter.grad, 1 - self.beta1)
        self.v.lerp_(parameter.grad.square(), 1 - self.beta2)
        self.vhat.copy_(torch.maximum(self.vhat, self.v))
        parameter.sub_(self.param_groups[0]["lr"] * self.m / self.vhat.sqrt())


class FedLALR(Method[FedLALRSettings, FedLALRHead]):
    """PromptFL with another optimizer, whose moments are averaged like the prompt."""

    section = FedLALRSettings
    head = FedLALRHead

    def schedule(self, head: FedLALRHead, epochs: int) -> list[Phase]:
        """Return one phase: the prompt."""
        return [(epochs, ("ctx",))]

    def optimizer(self, work: Work[FedLALRHead], groups: ParamsT) -> torch.optim.Optimizer:
        """Return AMSGrad over the head's own moments."""
        return AMSGrad(groups, work.head.m, work.head.vhat, self.own.beta1, self.own.beta2)

    def merge(self, state: ServerState, uploads: Mapping[int, Upload]) -> None:
        """Take the plain mean over the participants, whatever their number of images."""
        state.shared |= average(uploads, state.shared, weights=dict.fromkeys(uploads, 1.0))
