"""The frozen image tower f(.), live: for methods that learn pixels, or prompts inside the tower.

Shapes: B batch, H x W pixels, T patches, P prompts, L layers that get prompts, d embedding width.
"""

from typing import Any

import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from pfedmoap_flwr.clip.twin import twin
from pfedmoap_flwr.errors import UsageError


class ImageTower:
    """An image tower whose weights never change; gradients reach its inputs alone.

    It is no `nn.Module`: a head that holds one gets no parameters from it.
    """

    def __init__(self, visual: nn.Module, model: str) -> None:
        self.visual = visual.eval().requires_grad_(False)
        self.model = model

    @property
    def width(self) -> int:
        """The width of a prompt. Raises UsageError where the tower has no place for prompts."""
        return self._transformer().width

    @property
    def layers(self) -> int:
        """How many blocks there are. Raises UsageError where the tower has no place for prompts."""
        return len(self._transformer().resblocks)

    def encode(self, pixels: Tensor, prompts: Tensor | None = None) -> Tensor:
        """Return features (B, d) of pixels (B, 3, H, W), not normalised.

        Prompts, Visual Prompt Tuning's (Jia et al., ECCV 2022, arXiv 2203.12119), are read by a
        vision transformer after its class token. Shallow (P, width): they enter before the first
        block and pass through all (Eq. 4 and 5). Deep (L, P, width): each of the first L blocks
        gets fresh ones in place of what the block before made of its own (Eq. 6). With prompts
        (B, L, P, width) every image has its own.

        Raises UsageError for prompts where the tower has no place for them.
        """
        if prompts is None:
            return encode_image(self.visual, pixels)
        transformer = self._transformer()
        deep = prompts[None] if prompts.dim() == 2 else prompts
        each = deep if deep.dim() == 4 else deep[None].expand(len(pixels), *deep.shape)
        sizes = each.shape[0], each.shape[-1]
        fits = each.dim() == 4 and sizes == (len(pixels), self.width)
        if not fits or not 1 <= each.shape[1] <= self.layers:
            raise ValueError(
                f"prompts have shape {tuple(prompts.shape)}; it must be (P, {self.width}), or "
                f"(L, P, {self.width}) with L from 1 to {self.layers}, or (B, L, P, {self.width}) "
                f"for B = {len(pixels)} images"
            )
        prompted = twin(self.visual, "transformer", _Prompted(transformer.resblocks, each))
        return encode_image(prompted, pixels)

    def _transformer(self) -> Any:
        if not isinstance(self.visual, VisionTransformer):
            raise UsageError(
                f"clip.model={self.model}: its image tower, {type(self.visual).__name__}, has no "
                "layers that read prompts; use a ViT, as clip.model=ViT-B-16"
            )
        return self.visual.transformer


def encode_image(visual: nn.Module, pixels: Tensor) -> Tensor:
    """Return an image tower's features (B, d) of pixels (B, 3, H, W), not normalised."""
    found = visual(pixels)
    # CoCa's tower returns its tokens as well
    return found[0] if isinstance(found, tuple) else found


class _Prompted(nn.Module):
    """A vision transformer's blocks, some of which read prompts after the class token."""

    def __init__(self, blocks: nn.ModuleList, prompts: Tensor) -> None:
        super().__init__()
        self.blocks = blocks
        self.prompts = prompts  # (B, L, P, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the outputs (B, 1 + T, width) of class token and patches (B, 1 + T, width)."""
        first, rest = tokens[:, :1], tokens[:, 1:]
        after = 1 + self.prompts.shape[2]
        for number, block in enumerate(self.blocks):
            if number < self.prompts.shape[1]:
                prompts = self.prompts[:, number].to(tokens.dtype)
            tokens = block(torch.cat([first, prompts, rest], dim=1))
            first, prompts, rest = tokens[:, :1], tokens[:, 1:after], tokens[:, after:]
        # Prompts are left out, so that a tower that takes the mean of its outputs does not see them
        return torch.cat([first, rest], dim=1)
