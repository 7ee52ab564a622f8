"""Prompt + FedProx (Li et al., MLSys 2020, arXiv 1812.06127): a pull towards what was received."""

from torch import Tensor

from pfedmoap_flwr.methods.base import Method, PromptHead, Tensors
from pfedmoap_flwr.settings import Section, setting


class FedProxSettings(Section):
    """Settings of FedProx."""

    mu: float = setting(0.5, "weight of the proximal term", low=0)


class FedProx(Method[FedProxSettings]):
    """loss = CE + mu/2 ||P - P_g||^2, with the gradient of both terms."""

    section = FedProxSettings

    def loss(self, head: PromptHead, features: Tensor, labels: Tensor, received: Tensors) -> Tensor:
        """Return cross-entropy and the pull of every parameter that was received."""
        learned = dict(head.named_parameters())
        apart = sum((learned[n] - received[n]).square().sum() for n in learned if n in received)
        return super().loss(head, features, labels, received) + self.own.mu / 2 * apart
