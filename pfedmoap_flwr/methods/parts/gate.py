"""The attention gate of pFedMoAP (Luo, Chen, Wu, ICLR 2025, arXiv 2410.10114, Eq. 11)."""

import torch
from torch import Tensor, nn


class AttentionGate(nn.Module):
    """Multi-head attention of images over experts, per class; both have d_gating numbers.

    Scores are divided by sqrt(d_head), or multiplied by `score_scale` where given.
    """

    def __init__(
        self,
        d_gating: int,
        heads: int,
        generator: torch.Generator,
        score_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.score_scale = (d_gating // heads) ** -0.5 if score_scale is None else score_scale
        self.query = linear(d_gating, d_gating, generator)
        self.key = linear(d_gating, d_gating, generator)
        self.value = linear(d_gating, d_gating, generator)
        self.out = linear(d_gating, d_gating, generator)

    def forward(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Return T_MoE (B, C, d_gating) of images (B, d_gating) and experts (K+1, C, d_gating)."""
        n_experts = len(text_features)
        split = (self.heads, -1)
        query = self.query(image_features).unflatten(-1, split).movedim(1, 0)
        key = self.key(text_features).flatten(0, 1).unflatten(-1, split).permute(1, 2, 0)
        value = self.value(text_features).unflatten(-1, split).permute(2, 1, 0, 3)
        # Classes last, (heads, B, K+1, C): one matrix product, a softmax over whole rows of memory
        scores = (self.score_scale * query @ key).unflatten(-1, (n_experts, -1))
        weights = scores.softmax(dim=2)
        mixed = weights.permute(0, 3, 1, 2) @ value
        return self.out(mixed.permute(2, 1, 0, 3).flatten(-2))


def linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """Return nn.Linear with PyTorch's own initialisation, drawn from the given generator."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs)
    for parameter in (layer.weight, layer.bias):
        nn.init.uniform_(parameter, -(inputs**-0.5), inputs**-0.5, generator=generator)
    return layer
