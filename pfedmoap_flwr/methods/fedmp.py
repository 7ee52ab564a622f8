"""Fed-MP (Zeng, Yue, Wang, NAACL 2024, arXiv 2404.01232): adapters weighted by what clients know.

A client trains an adapter on the raw image feature x, and a residual R (C, d) of the text features:

    x' = a(x) * x,  t'_c = unit(t_c + alpha R_c),  CLIP's loss within a batch between x' and t'

R stays with the client. The server weighs adapters by how near a client's classes are to all C:

    s_k = SUM_g SUM_l t_g . t'_l / (C sqrt C),  A <- SUM_k s_k A_k / SUM_k s_k

with g over all classes and l over the client's own. "paper": s_k below 0 counts as 0. At test time
R has no say, and prototypes follow the stream of images (see `parts/prototypes.py`).
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.optimizer import ParamsT

from pfedmoap_flwr.methods.base import Method, ServerState, Tensors, Upload, Work
from pfedmoap_flwr.methods.parts.adapters import AdapterHead, TextResidual, adam
from pfedmoap_flwr.methods.parts.contrast import SameClass, in_batch
from pfedmoap_flwr.methods.parts.mean import average
from pfedmoap_flwr.methods.parts.prototypes import Available, Prototypes
from pfedmoap_flwr.methods.parts.similarity import not_negative, similarities
from pfedmoap_flwr.randomness import torch_generator
from pfedmoap_flwr.settings import Section, setting


class FedMPSettings(Section):
    """Settings of Fed-MP."""

    alpha: float = setting(0.3, "weight of the residual", low=0)
    start: float = setting(0.5, "the residual starts from U(-start, start)", above=0)
    uncertainty: float = setting(0.1, "entropy u, in ln C, below which an image is kept", low=0)
    available: Available = setting("each", "when image means count: a class has one, or all have")
    lr: float = setting(5e-5, "learning rate of adapter and residual (Adam)", above=0)
    decay: float = setting(0.2, "Adam's pull of both towards 0", low=0)
    same_class: SameClass = setting("negative", "what two images of one class in a batch are")


class FedMPHead(AdapterHead):
    """`adapter`, the client's `residual` (C, d), and fixed text features (C, d).

    stream: whether images are classified one after the other.
    """

    stream: Tensor

    def __init__(self, method: "FedMP") -> None:
        super().__init__(method)
        self.own, start = method.own, torch_generator(method.settings.seed, "residual")
        self.residual = TextResidual(self.text_features, self.own.alpha, self.own.start, start)
        self.register_buffer("stream", torch.tensor(False, device=self.device))

    def encode(self) -> Tensor:
        """Return text features (C, d), in training with the residual."""
        return self.residual(self.text_features) if self.training else self.text_features

    def predict(self, image_features: Tensor, encoded: Tensor) -> Tensor:
        """Return logits (n, C) of a split; as a stream each by prototypes of those before it."""
        if not self.stream:
            return super().predict(image_features, encoded)
        images = F.normalize(self.adapter(image_features), dim=-1)
        prototypes = Prototypes(encoded, self.own.uncertainty, self.own.available)
        return prototypes.follow(images, self.logit_scale)


class FedMP(Method[FedMPSettings, FedMPHead]):
    """Adapters are averaged by similarity; a client is measured on its images as a stream."""

    section = FedMPSettings
    head = FedMPHead
    personal = ("residual",)
    of_classes = ("residual",)

    def reports(self) -> dict[str, Tensor]:
        """Return `classes` (d,): SUM_l t'_l over the classes that a client has."""
        return {"classes": torch.zeros(self.build().text_features.shape[1])}

    def loss(self, head: FedMPHead, features: Tensor, labels: Tensor, received: Tensors) -> Tensor:
        """Return the contrastive loss of a batch."""
        return in_batch(head(features), labels, self.own.same_class)

    def lr(self, name: str, epoch: int, epochs: int) -> float:
        """Return the constant rate of adapter and residual."""
        return self.own.lr

    def optimizer(self, work: Work[FedMPHead], groups: ParamsT) -> torch.optim.Optimizer:
        """Return the public code's Adam, fresh in every round."""
        return adam(groups, self.own.decay)

    @torch.no_grad()
    def upload(self, work: Work[FedMPHead]) -> dict[str, Tensor]:
        """Return the adapter and the sum of the client's text features."""
        own_text = work.head.residual(work.head.text_features)
        classes = own_text[work.images.labels.unique()].sum(0)
        return super().upload(work) | {"classes": classes.cpu()}

    def adapt(self, work: Work[FedMPHead]) -> None:
        """Measure the client's images as a stream, from which prototypes are made."""
        work.head.stream = torch.ones_like(work.head.stream)

    def combine(self, state: ServerState, uploads: Mapping[int, Upload]) -> dict[str, Tensor]:
        """Return the adapters' mean by similarity; the plain mean where nobody is similar."""
        text_features = self.build().text_features.cpu()
        near = similarities(text_features, {i: u.tensors["classes"] for i, u in uploads.items()})
        state.metrics["smallest-similarity"] = min(near.values())
        released = self.settings.compat == "released"
        return average(uploads, state.shared, near if released else not_negative(near))
