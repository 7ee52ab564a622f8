"""DuAl-PT (arXiv 2309.04158), federated by averaging: prompts that know what classes look like.

A class has a description, a sentence whose text feature D_c is fixed. The prompt is held to the
descriptions, and to the patches that it finds in an image (`parts/descriptions.py`):

    loss = CE + l1 mean_c (1 - T_c . D_c) + l2 mean_b SUM_m A_bm (1 - x_bm . T_y)
"""

from torch import Tensor
from torch.nn import functional as F

from pfedmoap_flwr.clip.features import Reading
from pfedmoap_flwr.clip.load import FrozenClip
from pfedmoap_flwr.data.federated import Task
from pfedmoap_flwr.methods.base import Method, PromptHead, Tensors
from pfedmoap_flwr.methods.parts import descriptions
from pfedmoap_flwr.methods.settings import LearningSettings
from pfedmoap_flwr.settings import FilePath, Section, setting


class DuAlPTSettings(Section):
    """Settings of DuAl-PT."""

    descriptions: FilePath = setting("", "JSON file of {class: sentence}; empty: the bundled ones")
    text_weight: float = setting(1.0, "weight l1 of the descriptions", low=0)
    patch_weight: float = setting(1.0, "weight l2 of the patches", low=0)


class DuAlPTHead(PromptHead):
    """The prompt; an image is classified by its own feature, the first of its tokens."""

    def classify(self, image_features: Tensor, encoded: Tensor) -> Tensor:
        """Return logits (B, C) of tokens (B, 1 + M, d), the patches behind the image's own."""
        return super().classify(image_features[:, 0], encoded)


class DuAlPT(Method[DuAlPTSettings, DuAlPTHead]):
    """PromptFL with two more terms in the loss."""

    section = DuAlPTSettings
    head = DuAlPTHead
    reading = Reading("tokens")
    fidelity = "nearest version: the paper's losses could not be read, and it is not federated"

    def __init__(
        self, settings: LearningSettings, own: DuAlPTSettings, clip: FrozenClip, task: Task
    ) -> None:
        super().__init__(settings, own, clip, task)
        key = "dualpt.descriptions"
        self.described = descriptions.describe(clip, task, own.descriptions, key)

    def loss(self, head: DuAlPTHead, features: Tensor, labels: Tensor, received: Tensors) -> Tensor:
        """Return cross-entropy, and the distances to the descriptions and to the patches."""
        texts = head.encode()
        loss = F.cross_entropy(head.classify(features, texts), labels)
        to_texts = descriptions.distance_to_descriptions(texts, self.described)
        to_patches = descriptions.distance_to_patches(features[:, 1:], texts, labels)
        return loss + self.own.text_weight * to_texts + self.own.patch_weight * to_patches
