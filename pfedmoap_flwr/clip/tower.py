"""The frozen image tower f(.)."""

from typing import Any

from torch import Tensor


def encode_image(visual: Any, pixels: Tensor) -> Tensor:
    """Return an image tower's features (B, d) of pixels (B, 3, H, W), not normalised."""
    found = visual(pixels)
    # CoCa's tower returns its tokens as well
    return found[0] if isinstance(found, tuple) else found
