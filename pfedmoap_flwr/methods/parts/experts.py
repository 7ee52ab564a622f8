"""Prompts as experts, and the gate that mixes them for each image (FedJETs, arXiv 2306.08586)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pfedmoap_flwr.methods.base import Method, PromptHead


class GatedExperts(PromptHead):
    """M experts and a gate over images; `which` (K,) says which experts a client has in use.

    logits = SUM_k w_k logits_k, w = softmax(s gate x) over the K in use, while it trains; then the
    logits of the one expert that has the largest w. x is the unit-norm image, s the logit scale. M
    is the method's setting `num_experts`.
    """

    which: Tensor

    def __init__(self, method: Method[Any, Any]) -> None:
        super().__init__(method)
        n_experts = method.own.num_experts
        del self.ctx
        self.experts = nn.ParameterList(
            self.normal(f"expert {i}", *self.ctx_shape) for i in range(n_experts)
        )
        self.gate = self.normal("gate", n_experts, self.encoder.embed_dim)
        self.register_buffer("which", torch.arange(n_experts, device=self.device))

    def encode(self) -> Tensor:
        """Return text features (K, C, d) of the experts in use."""
        return self.encoder(torch.stack(list(self.experts))[self.which])

    def classify(self, image_features: Tensor, encoded: Tensor) -> Tensor:
        """Return logits (B, C): the gate's mixture in training, its best expert's afterwards."""
        weights = self.scores(image_features).softmax(-1)[:, self.which]
        if self.training:
            weights = weights / weights.sum(-1, keepdim=True)
        else:
            weights = F.one_hot(weights.argmax(-1), weights.shape[-1]).to(weights)
        x = F.normalize(image_features, dim=-1)
        return self.logit_scale * torch.einsum("bk,bd,kcd->bc", weights, x, encoded)

    def scores(self, image_features: Tensor) -> Tensor:
        """Return s gate x (B, M) of images (B, d)."""
        return self.logit_scale * F.normalize(image_features, dim=-1) @ self.gate.t()

    def loss_of_gate(self, image_features: Tensor, labels: Tensor, expert: Tensor) -> Tensor:
        """Return -log softmax(s gate x)_e (), the mean over images, of one expert e = (1,).

        An image with a label (B,) below 0 does not count.
        """
        wanted = torch.where(labels < 0, labels, expert)
        return F.cross_entropy(self.scores(image_features), wanted)
