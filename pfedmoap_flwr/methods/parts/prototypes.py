"""Fed-MP's classifier at test time (arXiv 2404.01232): it learns from images without labels.

Images come one by one. The prototype of class c is t_c + m_c: its text feature and the mean m_c of
the images that were taken for c with an entropy below u ln C. Until a class has an image

    "all": every prototype is t_c alone, until every class has one (the public code)
    "each": m_c is the mean of those m that there are, which is evidence for no class

An image lies far nearer to other images than to texts. If some classes had m_c and others nothing,
the first class to get an image would get all that follow.
"""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Available = Literal["each", "all"]


class Prototypes:
    """What a stream of images (d,) makes of text features (C, d)."""

    def __init__(self, text_features: Tensor, uncertainty: float, available: Available) -> None:
        self.text_features = text_features
        self.largest = uncertainty * math.log(len(text_features))
        self.available = available
        self.counts = text_features.new_zeros(len(text_features))
        self.sums = torch.zeros_like(text_features)

    def means(self) -> Tensor:
        """Return m (C, d); 0 for all where there is none yet."""
        seen = self.counts > 0
        means = self.sums / self.counts.clamp(min=1)[:, None]
        if self.available == "all":
            return means * seen.all()
        neutral = means.sum(0) / seen.sum().clamp(min=1)
        return torch.where(seen[:, None], means, neutral)

    def follow(self, images: Tensor, logit_scale: float) -> Tensor:
        """Return logits (n, C) of images (n, d), each by the prototypes of those before it."""
        return torch.stack([self.classify(image, logit_scale) for image in images])

    def classify(self, image: Tensor, logit_scale: float) -> Tensor:
        """Return logits (C,) of an image (d,) by the prototypes so far, and then learn from it."""
        logits = logit_scale * ((self.text_features + self.means()) @ image)
        log_p = logits.log_softmax(-1)
        sure = -(log_p.exp() * log_p).sum() < self.largest
        own = F.one_hot(logits.argmax(), len(logits)) * sure
        self.counts = self.counts + own
        self.sums = self.sums + own[:, None] * image
        return logits
