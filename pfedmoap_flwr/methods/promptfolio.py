"""PromptFolio (Pan et al., NeurIPS 2024, arXiv 2409.19610): text features of two prompts, mixed.

logit^(c) = sim(f(x), T^(c)) / tau with T = (1 - theta) T_g + theta T_l, where T_g and T_l are the
unit-norm text features of the global and the local prompt. T is not brought back to unit length:
the less the two agree about a class, the smaller its logits.
"""

import torch
from torch import Tensor

from pfedmoap_flwr.methods.base import Method, PromptHead
from pfedmoap_flwr.settings import Section, setting


class PromptFolioSettings(Section):
    """Settings of PromptFolio."""

    theta: float = setting(0.4, "weight of the local prompt's text features", low=0, high=1)


class PromptFolioHead(PromptHead):
    """The global prompt `ctx` and the client's `local` one."""

    def __init__(self, method: "PromptFolio") -> None:
        super().__init__(method)
        self.theta = method.own.theta
        self.local = self.normal("local", *self.ctx_shape)

    def encode(self) -> Tensor:
        """Return the mixed text features (C, d), of unit length or shorter."""
        # One by one: both in one product may round otherwise, and theta = 0 would not be PromptFL
        return torch.lerp(self.encoder(self.ctx), self.encoder(self.local), self.theta)


class PromptFolio(Method[PromptFolioSettings, PromptFolioHead]):
    """The global prompt is averaged, the local one stays; both are trained together."""

    section = PromptFolioSettings
    head = PromptFolioHead
    personal = ("local",)
