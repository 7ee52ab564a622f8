"""pFedLA with local attention (arXiv 2304.01783): an attention over patches that stays, a prompt.

A client looks at an image's patches X (M, d) with its own attention, before the shared prompt P is
compared with what it saw:

    X' = X + r MHA(LN X),    logit^(c) = logit_scale cos(x + mean_m X'_m, T_c)
"""

from torch import Tensor

from pfedmoap_flwr.clip.features import Reading
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.base import Method, PromptHead
from pfedmoap_flwr.methods.parts.attention import ResidualAttention
from pfedmoap_flwr.randomness import torch_generator
from pfedmoap_flwr.settings import Section, setting


class PFedLASettings(Section):
    """Settings of the attention."""

    share: float = setting(0.1, "weight r of what patches say of each other", low=0)
    heads: int = setting(8, "attention heads, a divisor of CLIP's width", low=1)


class PFedLAHead(PromptHead):
    """The shared prompt `ctx` and the client's `attention` over patches."""

    def __init__(self, method: "PFedLA") -> None:
        super().__init__(method)
        own, width = method.own, self.encoder.embed_dim
        if width % own.heads:
            raise UsageError(f"setting pfedla.heads={own.heads}: must divide CLIP's width {width}")
        generator = torch_generator(self.seed, "attention")
        self.attention = ResidualAttention(width, own.heads, own.share, generator).to(self.device)

    def classify(self, image_features: Tensor, encoded: Tensor) -> Tensor:
        """Return logits (B, C) of tokens (B, 1 + M, d), the patches behind the image's own."""
        seen = self.attention(image_features[:, 1:]).mean(1)
        return super().classify(image_features[:, 0] + seen, encoded)


class PFedLA(Method[PFedLASettings, PFedLAHead]):
    """The prompt is averaged, the attention stays; both are trained together."""

    section = PFedLASettings
    head = PFedLAHead
    reading = Reading("tokens")
    personal = ("attention",)
    fidelity = "nearest version: the paper is withdrawn, its equations could not be read"
