"""FedCLIP (Lu et al., 2023, arXiv 2302.13485): an attention adapter on the image features.

The text features are those of a fixed sentence. The image feature x, not normalised, becomes

    x' = a(x) * x,  a(x) = softmax(W2 tanh(W1 x + b1) + b2) over the d entries

and logit^(c) = logit_scale cos(x', text_features^(c)). Only the adapter is trained and averaged.

The loss is CLIP's own, within a batch: with S_ij = logit_scale cos(x'_i, text of the class of j),

    loss = (CE(S, i) + CE(S', i)) / 2, where image i belongs to text i
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pfedmoap_flwr.methods.base import Head, Method, ServerState, Tensors, Upload, Work, average
from pfedmoap_flwr.methods.parts.adapters import AttentionAdapter
from pfedmoap_flwr.methods.parts.contrast import SameClass, in_batch
from pfedmoap_flwr.randomness import torch_generator
from pfedmoap_flwr.settings import Section, setting


class FedCLIPSettings(Section):
    """Settings of FedCLIP."""

    adapter_lr: float = setting(5e-5, "learning rate of the adapter (Adam)", above=0)
    decay: float = setting(0.2, "Adam's pull of the adapter towards 0", low=0)
    same_class: SameClass = setting(
        "negative", "what two images of one class in a batch are to each other"
    )


class FedCLIPHead(Head):
    """The adapter in front of fixed text features (C, d)."""

    def __init__(self, method: "FedCLIP") -> None:
        super().__init__(method)
        self.text_features = method.clip.zeroshot(method.task.classnames, method.task.template)
        self.logit_scale = method.clip.logit_scale
        generator = torch_generator(method.settings.seed, "adapter")
        self.adapter = AttentionAdapter(self.text_features.shape[1], generator).to(self.device)

    def encode(self) -> Tensor:
        """Return the text features (C, d)."""
        return self.text_features

    def classify(self, image_features: Tensor, encoded: Tensor) -> Tensor:
        """Return logits (B, C) of image features (B, d)."""
        adapted = F.normalize(self.adapter(image_features), dim=-1)
        return self.logit_scale * (adapted @ encoded.t())


class FedCLIP(Method[FedCLIPSettings, FedCLIPHead]):
    """Adam on the adapter; the server takes the plain mean of the adapters."""

    section = FedCLIPSettings
    head = FedCLIPHead

    def loss(
        self, head: FedCLIPHead, features: Tensor, labels: Tensor, received: Tensors
    ) -> Tensor:
        """Return the contrastive loss of a batch."""
        pairs = head(features)[:, labels.clamp(min=0)]
        return in_batch(pairs, labels, self.own.same_class)

    def lr(self, name: str, epoch: int, epochs: int) -> float:
        """Return the adapter's constant rate."""
        return self.own.adapter_lr

    def optimizer(
        self, work: Work[FedCLIPHead], groups: list[dict[str, Any]]
    ) -> torch.optim.Optimizer:
        """Return the paper's Adam, fresh in every round."""
        decay = self.own.decay
        return torch.optim.Adam(groups, betas=(0.9, 0.98), eps=1e-6, weight_decay=decay)

    def merge(self, state: ServerState, uploads: Mapping[int, Upload]) -> None:
        """Take the plain mean over the participants, whatever their number of images."""
        state.shared |= average(uploads, state.shared, weights=dict.fromkeys(uploads, 1.0))
