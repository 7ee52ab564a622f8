"""Zero-shot CLIP (Radford et al., ICML 2021, arXiv 2103.00020): a hand-written sentence."""

from torch import Tensor
from torch.nn import functional as F

from pfedmoap_flwr.methods.base import Head, Method
from pfedmoap_flwr.settings import Section


class ZeroShotHead(Head):
    """Fixed text features (C, d); it has no parameters, so nothing is trained or sent."""

    def __init__(self, method: "ZeroShot") -> None:
        super().__init__(method)
        self.text_features = method.clip.zeroshot(method.task.classnames, method.task.template)
        self.logit_scale = method.clip.logit_scale

    def encode(self) -> Tensor:
        """Return the text features (C, d)."""
        return self.text_features

    def classify(self, image_features: Tensor, encoded: Tensor) -> Tensor:
        """Return logits (B, C)."""
        return self.logit_scale * (F.normalize(image_features, dim=-1) @ encoded.t())


class ZeroShot(Method[Section, ZeroShotHead]):
    """The sentence, "a photo of a <class>.", is the data set's or the setting data.template."""

    head = ZeroShotHead
