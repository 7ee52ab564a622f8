"""FedTPG's prompt generator (Qiu et al., ICLR 2024, arXiv 2310.06123): class names to contexts.

From queries Q (M, D) and the class names' text features E (C, d):

    Z = attention(LN(Q), LN(E), LN(E)),     Z <- Z + FF(Z)
    then for each further layer:            Z <- Z + attention(LN(Z), LN(Z), LN(Z)),  Z <- Z + FF(Z)
    FF(Z) = W2 (a * GELU(b)) with [a, b] = W1 LN(Z), where a and b are 4 D wide

There is no residual around the first attention: the context is made of what the classes say.

Shapes: C classes, M context tokens, D text width, d embedding width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pfedmoap_flwr.methods.parts.gate import linear

WIDENING = 4


class PromptGenerator(nn.Module):
    """Queries (..., M, D) that look at class features (C, d), then at each other `depth` times.

    `heads` must divide `width`, which is D; `embed_dim` is d.
    """

    def __init__(
        self, width: int, embed_dim: int, heads: int, depth: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.norm_classes = nn.LayerNorm(embed_dim)
        self.first = Layer(width, embed_dim, heads, generator)
        self.layers = nn.ModuleList(Layer(width, width, heads, generator) for _ in range(depth))

    def forward(self, queries: Tensor, class_features: Tensor, seen: Tensor) -> Tensor:
        """Return contexts (..., M, D); of the classes only those with `seen` (C,) true are read."""
        classes = self.norm_classes(class_features)
        z = self.first.attention(self.first.norm(queries), classes, seen)
        z = z + self.first.feed_forward(z)
        for layer in self.layers:
            z = layer(z)
        return z


class Layer(nn.Module):
    """Attention and feed-forward; called, it is self-attention with residuals."""

    def __init__(self, width: int, read_width: int, heads: int, generator: torch.Generator) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, read_width, heads, generator)
        self.feed_forward = FeedForward(width, generator)

    def forward(self, z: Tensor) -> Tensor:
        """Return (..., M, D) of (..., M, D)."""
        normal = self.norm(z)
        z = z + self.attention(normal, normal)
        return z + self.feed_forward(z)


class Attention(nn.Module):
    """Multi-head attention of queries (..., M, D) over what is read (..., C, read_width)."""

    def __init__(self, width: int, read_width: int, heads: int, generator: torch.Generator) -> None:
        super().__init__()
        self.heads = heads
        self.query = linear(width, width, generator)
        self.key = linear(read_width, width, generator)
        self.value = linear(read_width, width, generator)
        self.out = linear(width, width, generator)

    def forward(self, queries: Tensor, read: Tensor, seen: Tensor | None = None) -> Tensor:
        """Return (..., M, D); where `seen` (C,) is false, nothing is read."""
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(-2, -3)
            for part in (self.query(queries), self.key(read), self.value(read))
        )
        scores = query @ key.mT * query.shape[-1] ** -0.5
        if seen is not None:
            scores = scores.masked_fill(~seen, -torch.inf)
        return self.out((scores.softmax(-1) @ value).transpose(-2, -3).flatten(-2))


class FeedForward(nn.Module):
    """A gated linear unit (GEGLU), four times as wide inside."""

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.widen = linear(width, 2 * WIDENING * width, generator)
        self.narrow = linear(WIDENING * width, width, generator)

    def forward(self, z: Tensor) -> Tensor:
        """Return (..., D) of (..., D), without the residual."""
        value, gate = self.widen(self.norm(z)).chunk(2, dim=-1)
        return self.narrow(value * F.gelu(gate))
