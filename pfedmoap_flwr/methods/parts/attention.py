"""Self-attention over an image's patches, added to them with a small weight."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pfedmoap_flwr.methods.parts.gate import linear


class ResidualAttention(nn.Module):
    """X' = X + r MHA(LN X): four matrices (d, d) without biases, and LN without parameters.

    MHA's head h is softmax(Q_h K_h' / sqrt(d / heads)) V_h; all heads side by side go through the
    fourth matrix.
    """

    def __init__(self, width: int, heads: int, share: float, generator: torch.Generator) -> None:
        super().__init__()
        self.heads, self.share = heads, share
        self.query = linear(width, width, generator, bias=False)
        self.key = linear(width, width, generator, bias=False)
        self.value = linear(width, width, generator, bias=False)
        self.out = linear(width, width, generator, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return X' (B, M, d) of tokens X (B, M, d)."""
        inputs = F.layer_norm(tokens, tokens.shape[-1:])
        query, key, value = (
            layer(inputs).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)
        mixed = (weights @ value).transpose(1, 2).flatten(-2)
        return tokens + self.share * self.out(mixed)
