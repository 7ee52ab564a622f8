"""FedCLIP (Lu et al., 2023, arXiv 2302.13485): an attention adapter on the image features.

The text features are those of a fixed sentence. The image feature x, not normalised, becomes

    x' = a(x) * x,  a(x) = softmax(W2 tanh(W1 x + b1) + b2) over the d entries

and logit^(c) = logit_scale cos(x', text_features^(c)). Only the adapter is trained and averaged.

The loss is CLIP's own, within a batch: with S_ij = logit_scale cos(x'_i, text of the class of j),

    loss = (CE(S, i) + CE(S', i)) / 2, where image i belongs to text i
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from pfedmoap_flwr.methods.base import Method, ServerState, Tensors, Upload, Work
from pfedmoap_flwr.methods.parts.adapters import AdapterHead, adam
from pfedmoap_flwr.methods.parts.contrast import SameClass, in_batch
from pfedmoap_flwr.methods.parts.mean import average
from pfedmoap_flwr.settings import Section, setting


class FedCLIPSettings(Section):
    """Settings of FedCLIP."""

    adapter_lr: float = setting(5e-5, "learning rate of the adapter (Adam)", above=0)
    decay: float = setting(0.2, "Adam's pull of the adapter towards 0", low=0)
    same_class: SameClass = setting(
        "negative", "what two images of one class in a batch are to each other"
    )


class FedCLIP(Method[FedCLIPSettings, AdapterHead]):
    """Adam on the adapter; the server takes the plain mean of the adapters."""

    section = FedCLIPSettings
    head = AdapterHead

    def loss(
        self, head: AdapterHead, features: Tensor, labels: Tensor, received: Tensors
    ) -> Tensor:
        """Return the contrastive loss of a batch."""
        return in_batch(head(features), labels, self.own.same_class)

    def lr(self, name: str, epoch: int, epochs: int) -> float:
        """Return the adapter's constant rate."""
        return self.own.adapter_lr

    def optimizer(self, work: Work[AdapterHead], groups: ParamsT) -> torch.optim.Optimizer:
        """Return the paper's Adam, fresh in every round."""
        return adam(groups, self.own.decay)

    def merge(self, state: ServerState, uploads: Mapping[int, Upload]) -> None:
        """Take the plain mean over the participants, whatever their number of images."""
        state.shared |= average(uploads, state.shared, weights=dict.fromkeys(uploads, 1.0))
