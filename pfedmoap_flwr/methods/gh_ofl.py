"""GH-OFL (Turazza, Picone, Mamei, ICLR 2026, arXiv 2602.01186): Gaussian heads from statistics.

No gradient anywhere. A client sends N_c, SUM_c x and second moments of its image features x, not
normalised. The server fits p(x | c) = N(mu_c, S_c) on the sums over all clients:

    lda: S_c = S = (SUM x x' - SUM N_c mu_c mu_c') / (N - C), one covariance for all classes
    nb:  S_c = diag(SUM_c x^2 / N_c - mu_c^2)
    qda: S_c = (SUM_c x x' - N_c mu_c mu_c') / (N_c - 1)

    logit^(c) = log N_c / N + log N(x; mu_c, S_c)

lda and qda shrink a covariance to (1 - s) S_c + s tr(S_c)/d I (see `parts/gaussian.py`).
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from pfedmoap_flwr.methods.base import Deliveries, Head, Method, ServerState, Upload, Work
from pfedmoap_flwr.methods.parts.gaussian import add_once, fit
from pfedmoap_flwr.methods.parts.moments import class_means, statistics
from pfedmoap_flwr.settings import Section, setting

HEAD = ("weight", "bias", "curvature")


class GHOFLSettings(Section):
    """Settings of GH-OFL."""

    head: Literal["lda", "nb", "qda"] = setting(
        "lda", "covariance of a class: shared, its own diagonal, its own"
    )
    shrinkage: float = setting(0.05, "share s of tr/d I in a covariance", low=0, high=1)


class GHOFLHead(Head):
    """The server's classifier in buffers, none of which is kept; zero-shot CLIP before it came."""

    weight: Tensor
    bias: Tensor
    curvature: Tensor | None

    def __init__(self, method: "GHOFL") -> None:
        super().__init__(method)
        text_features = method.clip.zeroshot(method.task.classnames, method.task.template)
        start = (text_features.clone(), torch.zeros_like(text_features[:, 0]), None)
        for name, tensor in zip(HEAD, start, strict=True):
            self.register_buffer(name, tensor, persistent=False)

    def encode(self) -> Tensor:
        """Return the weight (C, d)."""
        return self.weight

    def classify(self, image_features: Tensor, encoded: Tensor) -> Tensor:
        """Return logits (B, C) of image features (B, d)."""
        x, curvature = image_features, self.curvature
        logits = x @ encoded.t() + self.bias
        if curvature is None:
            return logits
        if curvature.ndim == 2:
            return logits - x.square() @ curvature.t() / 2
        return logits - torch.einsum("bd,cde,be->bc", x, curvature, x) / 2


class GHOFL(Method[GHOFLSettings, GHOFLHead]):
    """Statistics up, a classifier down; a client is counted once, however often it takes part."""

    section = GHOFLSettings
    head = GHOFLHead
    fidelity = "faithful: the closed-form heads"

    def reports(self) -> dict[str, Tensor]:
        """Return what a client without images sends: counts (C,), sums (C, d), moments."""
        width = self.build().weight.shape[1]
        return self.statistics(torch.zeros(0, width), torch.zeros(0, dtype=torch.long))

    def statistics(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return what goes up of images (n, d) and labels (n,)."""
        return statistics(features, labels, len(self.task.classnames), self.own.head)

    def upload(self, work: Work[GHOFLHead]) -> dict[str, Tensor]:
        """Return the statistics of the client's training images."""
        return self.statistics(work.images.features, work.images.labels)

    def adapt(self, work: Work[GHOFLHead]) -> None:
        """Take the server's classifier: nothing is personal."""
        work.head.load(work.received)

    def send(self, state: ServerState, client_ids: Sequence[int], *, train: bool) -> Deliveries:
        """Return the classifier, nothing before there is one."""
        head = {name: state.extra[name] for name in HEAD if name in state.extra}
        return {i: dict(head) for i in client_ids}

    def merge(self, state: ServerState, uploads: Mapping[int, Upload]) -> None:
        """Add the statistics of clients that are new, and fit the classifier."""
        add_once(state, uploads)
        counts, sums, second = (state.extra[name] for name in self.reports())
        means, own = class_means(counts, sums), self.own
        found = fit(own.head, counts, means, second, own.shrinkage)
        state.extra |= {name: tensor.float() for name, tensor in found.items()}
