"""What is learned behind the towers; image features are as the tower gives them, not normalised."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import ParamsT

from pfedmoap_flwr.methods.base import Head, Method
from pfedmoap_flwr.methods.parts.gate import linear
from pfedmoap_flwr.randomness import torch_generator


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


class AdapterHead(Head):
    """An `AttentionAdapter` in front of fixed text features (C, d).

    logit^(c) = logit_scale cos(a(x) * x, text_features^(c)).
    """

    def __init__(self, method: Method[Any, Any]) -> None:
        super().__init__(method)
        self.text_features = method.clip.zeroshot(method.task.classnames, method.task.template)
        self.logit_scale = method.clip.logit_scale
        generator = torch_generator(method.settings.seed, "adapter")
        self.adapter = AttentionAdapter(self.text_features.shape[1], generator).to(self.device)

    def encode(self) -> Tensor:
        """Return the text features (C, d)."""
        return self.text_features

    def classify(self, image_features: Tensor, encoded: Tensor) -> Tensor:
        """Return logits (B, C) of image features (B, d)."""
        adapted = F.normalize(self.adapter(image_features), dim=-1)
        return self.logit_scale * (adapted @ encoded.t())


def adam(groups: ParamsT, decay: float) -> torch.optim.Adam:
    """Return the Adam of FedCLIP's public code, which Fed-MP's took over."""
    return torch.optim.Adam(groups, betas=(0.9, 0.98), eps=1e-6, weight_decay=decay)


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
        self.rows = nn.Parameter(rows.to(like.device))

    def forward(self, text_features: Tensor) -> Tensor:
        """Return t' (C, d), unit-norm, of text features (C, d)."""
        return F.normalize(text_features + self.alpha * self.rows, dim=-1)
