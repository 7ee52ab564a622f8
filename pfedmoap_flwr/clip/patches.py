"""Every position of an image in the joint space, as FedOTP's released code has it."""

from typing import Any

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from pfedmoap_flwr.errors import UsageError


def project_positions(visual: Any, pixels: Tensor) -> Tensor:
    """Return (B, 1 + T, d), not normalised: what stands for the whole image, then its T patches.

    A vision transformer's final norm and projection are applied to all its tokens, not to the class
    token alone. In a ResNet's attention pool every position of the feature map is a query, not
    their mean alone.

    Raises UsageError for an image tower that has no patches in the joint space.
    """
    if isinstance(visual, ModifiedResNet):
        found = visual.forward_intermediates(pixels, indices=1, intermediates_only=True)
        return _attend(visual.attnpool, found["image_intermediates"][0])
    if isinstance(visual, VisionTransformer) and visual.attn_pool is None:
        found = visual.forward_intermediates(
            pixels,
            indices=1,
            normalize_intermediates=True,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        positions = found["image_intermediates_prefix"] + found["image_intermediates"]
        return torch.cat(positions, dim=1) @ visual.proj
    raise UsageError(
        f"patch tokens cannot be read from the image tower {type(visual).__name__}; use a ViT or "
        "RN model of clip.model"
    )


def _attend(pool: Any, grid: Tensor) -> Tensor:
    """Return the attention pool's outputs (B, 1 + H*W, d) with all positions as queries."""
    x = grid.flatten(2).transpose(1, 2)
    x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + pool.positional_embedding
    query, key, value = (
        project(x).unflatten(-1, (pool.num_heads, -1)).transpose(1, 2)
        for project in (pool.q_proj, pool.k_proj, pool.v_proj)
    )
    attended = F.scaled_dot_product_attention(query, key, value)
    return pool.c_proj(attended.transpose(1, 2).flatten(2))
