"""The gates of pFedMoAP (Luo, Chen, Wu, ICLR 2025, arXiv 2410.10114): Eq. 11, and Table 7's rival.

A gate mixes the text features of K + 1 experts, the client's own the first of them, for each image.
Shapes: B images, C classes, D numbers of a reduced feature (d_gating), K borrowed experts.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class AttentionGate(nn.Module):
    """Multi-head attention of images over experts, per class (Eq. 11).

    Scores are multiplied by `score_scale`, 1 / sqrt(d_head) where none is given.
    learned: the scale is trained, from there on. unit: queries and keys have unit length in each
    head, so that a score is a cosine.
    """

    def __init__(
        self,
        d_gating: int,
        heads: int,
        generator: torch.Generator,
        score_scale: float | None = None,
        *,
        learned: bool = False,
        unit: bool = False,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.unit = unit
        self.score_scale = (d_gating // heads) ** -0.5 if score_scale is None else score_scale
        self.query = linear(d_gating, d_gating, generator)
        self.key = linear(d_gating, d_gating, generator)
        self.value = linear(d_gating, d_gating, generator)
        self.out = linear(d_gating, d_gating, generator)
        if learned:
            # In logarithms, so that it stays positive
            self.log_scale = nn.Parameter(torch.tensor(math.log(self.score_scale)))
        else:
            self.register_parameter("log_scale", None)

    def forward(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Return T_MoE (B, C, D) of images (B, D) and experts (K+1, C, D)."""
        weights = self.attention(image_features, text_features)
        value = self.value(text_features).unflatten(-1, (self.heads, -1)).permute(2, 1, 0, 3)
        mixed = weights.permute(0, 3, 1, 2) @ value
        return self.out(mixed.permute(2, 1, 0, 3).flatten(-2))

    def attention(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Return how much of each expert an image takes, (heads, B, K+1, C), summing to 1."""
        query = self.query(image_features).unflatten(-1, (self.heads, -1)).movedim(1, 0)
        key = self.key(text_features).flatten(0, 1).unflatten(-1, (self.heads, -1))
        if self.unit:
            query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
        scale = self.score_scale if self.log_scale is None else self.log_scale.exp()
        # Classes innermost: (heads, B, K+1, C) is one product and a softmax over whole rows
        scores = scale * query @ key.permute(1, 2, 0)
        return scores.unflatten(-1, (len(text_features), -1)).softmax(dim=2)


class LinearGate(nn.Module):
    """A linear layer gives each expert its weight, whatever the expert is (Table 7's rival).

    The paper has no formula of it; this is ours: T_MoE = SUM_k softmax(W x + b)_k T_k, the usual
    gate of a mixture of experts. Where fewer than K experts came, the first rows of W count.
    """

    def __init__(self, d_gating: int, num_experts: int, generator: torch.Generator) -> None:
        super().__init__()
        self.weigh = linear(d_gating, num_experts + 1, generator)

    def forward(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Return T_MoE (B, C, D) of images (B, D) and experts (K+1, C, D)."""
        weights = self.attention(image_features, text_features)[0, :, :, 0]
        return torch.einsum("bk,kcd->bcd", weights, text_features)

    def attention(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Return how much of each expert an image takes, (1, B, K+1, 1), summing to 1."""
        weights = self.weigh(image_features)[:, : len(text_features)].softmax(dim=-1)
        return weights[None, :, :, None]


def linear(
    inputs: int, outputs: int, generator: torch.Generator, *, bias: bool = True
) -> nn.Linear:
    """Return nn.Linear with PyTorch's own initialisation, drawn from the given generator."""
    layer = _Undrawn(inputs, outputs, bias=bias)
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -(inputs**-0.5), inputs**-0.5, generator=generator)
    return layer


class _Undrawn(nn.Linear):
    """A layer whose numbers come later.

    `nn.utils.skip_init` does the same in milliseconds, and a gate is built for every message.
    """

    def reset_parameters(self) -> None:
        """Draw nothing: PyTorch's own would draw from the generator of the whole process."""
