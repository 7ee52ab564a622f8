"""pFedPT (Li et al., 2023, arXiv 2303.08678): a frame of pixels, which stays, around every image.

Here the shared model is the text prompt: the image tower is frozen, and gradients reach the frame
through it. Each round trains the frame first, then the prompt.
"""

import torch
from torch import Tensor

from pfedmoap_flwr.clip.features import Reading
from pfedmoap_flwr.methods.base import Method, Phase, PromptHead
from pfedmoap_flwr.settings import Section, setting


class PFedPTSettings(Section):
    """Settings of pFedPT."""

    width: int = setting(2, "of the frame, in pixels", low=1)
    pixel_lr: float = setting(1.0, "learning rate of the frame (SGD)", above=0)


class PFedPTHead(PromptHead):
    """A prompt and a frame of pixels (3, H, W), which is 0 inside."""

    def __init__(self, method: "PFedPT") -> None:
        super().__init__(method)
        height, width = method.clip.image_size
        n = method.own.width
        self.tower = method.clip.tower
        self.outside = torch.ones(height, width, device=self.device)
        self.outside[n : height - n, n : width - n] = 0
        self.frame = self.normal("frame", 3, height, width, std=1.0)

    def classify(self, image_features: Tensor, encoded: Tensor) -> Tensor:
        """Return logits (B, C) of pixels (B, 3, H, W)."""
        framed = image_features + self.frame * self.outside
        return super().classify(self.tower.encode(framed), encoded)


class PFedPT(Method[PFedPTSettings, PFedPTHead]):
    """First the frame, which is personal, then the prompt, which is averaged."""

    section = PFedPTSettings
    head = PFedPTHead
    reading = Reading("pixels")
    personal = ("frame",)
    fidelity = "nearest version: the shared model is the text prompt"

    def schedule(self, head: PFedPTHead, epochs: int) -> list[Phase]:
        """Return the two phases."""
        return [(epochs, ("frame",)), (epochs, head.prompt)]

    def lr(self, name: str, epoch: int, epochs: int) -> float:
        """Return the frame's own rate, or the prompt's."""
        return self.own.pixel_lr if name == "frame" else super().lr(name, epoch, epochs)
