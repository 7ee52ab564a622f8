"""Zero-shot CLIP (Radford et al., ICML 2021, arXiv 2103.00020): a hand-written sentence."""

from typing import Any

from torch import Tensor

from pfedmoap_flwr.clip.load import FrozenClip
from pfedmoap_flwr.methods.base import Head, Method, Task


class ZeroShotHead(Head):
    """Fixed text features (C, d); it has no parameters, so nothing is trained or sent."""

    def __init__(self, text_features: Tensor, logit_scale: float) -> None:
        super().__init__()
        self.text_features = text_features
        self.logit_scale = logit_scale

    def encode(self) -> Any:
        """Return the text features (C, d)."""
        return self.text_features

    def classify(self, image_features: Tensor, encoded: Any) -> Tensor:
        """Return logits (B, C)."""
        return self.logit_scale * image_features @ encoded.t()


class ZeroShot(Method):
    """The sentence, "a photo of a <class>.", is the data set's or the setting data.template."""

    def build(self, clip: FrozenClip, task: Task) -> Head:
        """Return the head with the data set's hand-written prompts."""
        features = clip.zeroshot(task.classnames, task.template)
        return ZeroShotHead(features, clip.logit_scale)
