"""pFedPrompt (Guo et al., WWW 2023): a common prompt, and a memory of the client's own images.

Nearest version: the paper's equations were not to be had. Its "non-parametric" attention over a
client's own image features is written here as Tip-Adapter's memory (arXiv 2111.03930):

    logits = sim(f(x), g(P_g)) / tau + alpha exp(-beta (1 - f(x) K')) Y

K (n, d) are the unit-norm features of the client's n training images, Y (n, C) their labels.

The memory is empty in training. A training image would find itself there, which gives its label
away, and the prompt would have little left to learn.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from pfedmoap_flwr.methods.base import Method, PromptHead, Work
from pfedmoap_flwr.settings import Section, setting


class PFedPromptSettings(Section):
    """Settings of pFedPrompt."""

    alpha: float = setting(1.0, "weight of the memory", low=0)
    beta: float = setting(5.5, "sharpness of the memory", above=0)


class PFedPromptHead(PromptHead):
    """The prompt, and the memory: `keys` K and `values` Y, which are neither sent nor kept."""

    keys: Tensor
    values: Tensor

    def __init__(self, method: "PFedPrompt") -> None:
        super().__init__(method)
        self.own = method.own
        keys = torch.zeros(0, self.encoder.embed_dim, device=self.device)
        values = torch.zeros(0, len(method.task.classnames), device=self.device)
        self.register_buffer("keys", keys, persistent=False)
        self.register_buffer("values", values, persistent=False)

    def classify(self, image_features: Tensor, encoded: Tensor) -> Tensor:
        """Return logits (B, C): the prompt's, and beside them the memory's."""
        logits = super().classify(image_features, encoded)
        return logits + self.own.alpha * self.recall(image_features)

    def recall(self, image_features: Tensor) -> Tensor:
        """Return the votes (B, C) of the images in memory, the nearest ones' the strongest."""
        cosine = F.normalize(image_features, dim=-1) @ self.keys.t()
        return torch.exp(-self.own.beta * (1 - cosine)) @ self.values


class PFedPrompt(Method[PFedPromptSettings, PFedPromptHead]):
    """Trains as PromptFL; a client's personal model is P_g with a memory of its own images."""

    section = PFedPromptSettings
    head = PFedPromptHead
    fidelity = "nearest version: the local attention is Tip-Adapter's memory"

    def adapt(self, work: Work[PFedPromptHead]) -> None:
        """Take P_g, and fill the memory with the client's training images."""
        head, images = work.head, work.images
        head.load(work.received)
        head.keys = F.normalize(images.features, dim=-1)
        head.values = F.one_hot(images.labels, head.values.shape[1]).to(head.keys)
