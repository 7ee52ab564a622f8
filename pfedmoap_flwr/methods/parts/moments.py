"""Sums over a client's images from which class means and covariances follow, whoever adds them."""

from collections.abc import Mapping, Sequence

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


def counted_means(features: Tensor, labels: Tensor, n_classes: int) -> dict[str, Tensor]:
    """Return `prototypes` mu_c (C, d) and `counts` N_c (C,) of images, float32 on the CPU."""
    counts, sums = class_sums(features, labels, n_classes)
    sent = {"prototypes": class_means(counts, sums), "counts": counts}
    return {name: tensor.float().cpu() for name, tensor in sent.items()}


def pooled_means(sent: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Return the class means (C, d) over all clients, of the `counted_means` that each one sent."""
    counts = [each["counts"].double() for each in sent]
    sums = [n[:, None] * each["prototypes"] for n, each in zip(counts, sent, strict=True)]
    return class_means(torch.stack(counts).sum(0), torch.stack(sums).sum(0))


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
