"""Sums over a client's images from which class means and covariances follow, whoever adds them."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def class_sums(features: Tensor, labels: Tensor, n_classes: int) -> tuple[Tensor, Tensor]:
    """Return N_c (C,) and A_c = SUM x (C, d) of the images of each class, in float64."""
    member = F.one_hot(labels, n_classes).double()
    return member.sum(0), member.t() @ features.double()


def class_means(counts: Tensor, sums: Tensor) -> Tensor:
    """Return mu_c = A_c / N_c (C, d); 0 for a class without images. Counts may be fractions."""
    return sums / torch.where(counts > 0, counts, 1)[:, None]


def pooled_means(counts: Sequence[Tensor], means: Sequence[Tensor]) -> Tensor:
    """Return the class means (C, d) over all clients, of each one's N_c (C,) and mu_c (C, d)."""
    sums = [n.double()[:, None] * mean for n, mean in zip(counts, means, strict=True)]
    return class_means(torch.stack(list(counts)).double().sum(0), torch.stack(sums).sum(0))


def statistics(features: Tensor, labels: Tensor, n_classes: int, of: str) -> dict[str, Tensor]:
    """Return what a client sends for a Gaussian classifier of a kind, float32 on the CPU.

    `counts` (C,), `sums` (C, d), and `moments` as `second_moments` has them.
    """
    counts, sums = class_sums(features, labels, n_classes)
    second = second_moments(features, labels, n_classes, of)
    sent = {"counts": counts, "sums": sums, "moments": second}
    return {name: tensor.float().cpu() for name, tensor in sent.items()}


def second_moments(features: Tensor, labels: Tensor, n_classes: int, of: str) -> Tensor:
    """Return second moments in float64: of "lda" SUM x x' (d, d) over all images.

    Of "qda" SUM_c x x' (C, d, d) for each class, of "nb" its diagonals SUM_c x^2 (C, d).
    """
    x = features.double()
    if of == "lda":
        return x.t() @ x
    if of == "nb":
        return class_sums(x.square(), labels, n_classes)[1]
    return torch.stack([x[labels == c].t() @ x[labels == c] for c in range(n_classes)])
