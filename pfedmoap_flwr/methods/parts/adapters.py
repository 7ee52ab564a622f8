"""What is learned behind the towers; image features are as the tower gives them, not normalised."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pfedmoap_flwr.methods.parts.gate import linear


class AttentionAdapter(nn.Module):
    """FedCLIP's adapter (Lu et al., 2023, arXiv 2302.13485), which Fed-MP uses too.

    a(x) = softmax(W2 tanh(W1 x + b1) + b2) over the d entries, and x becomes a(x) * x.
    """

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.inner = linear(width, width, generator)
        self.outer = linear(width, width, generator)

    def forward(self, image_features: Tensor) -> Tensor:
        """Return a(x) * x (..., d) of image features (..., d)."""
        attention = self.outer(self.inner(image_features).tanh()).softmax(-1)
        return attention * image_features


class Bottleneck(nn.Module):
    """FedDDA's adapter (Yang et al., ICML 2025): A(x) = ReLU(W2 ReLU(W1 x)), d -> d/4 -> d."""

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.down = linear(width, width // 4, generator, bias=False)
        self.up = linear(width // 4, width, generator, bias=False)

    def forward(self, image_features: Tensor) -> Tensor:
        """Return A(x) (..., d), nowhere negative, of image features (..., d)."""
        return self.up(self.down(image_features).relu()).relu()


class TextResidual(nn.Module):
    """Fed-MP's residual R of text features (Zeng et al., NAACL 2024, arXiv 2404.01232).

    t'_c = unit(t_c + alpha R_c) with a row for each class, R starting from U(-start, start).
    """

    def __init__(
        self, like: Tensor, alpha: float, start: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.alpha = alpha
        rows = torch.empty(like.shape).uniform_(-start, start, generator=generator)
        self.rows = nn.Parameter(rows)

    def forward(self, text_features: Tensor) -> Tensor:
        """Return t' (C, d), unit-norm, of text features (C, d)."""
        return F.normalize(text_features + self.alpha * self.rows, dim=-1)
