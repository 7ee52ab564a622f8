"""Gaussian classifiers from sums over images, in float64.

GH-OFL (ICLR 2026, arXiv 2602.01186) and TOFA (AAAI 2026, arXiv 2511.16423).

N_c (C,) images of class c with the mean mu_c (C, d), and their moments: M = SUM x x' (d, d) of all
images, or M_c = SUM_c x x' (C, d, d), or the diagonals of M_c (C, d). A classifier is
{"weight": (C, d), "bias": (C,)} and maybe "curvature", (C, d) or (C, d, d):

    logit^(c) = bias_c + weight_c . x - x' curvature_c x / 2
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from pfedmoap_flwr.methods.base import ServerState, Upload
from pfedmoap_flwr.methods.parts.moments import class_means

RIDGE = 1e-6
SMALLEST_SHARE = 1e-12
STATISTICS = ("counts", "sums", "moments")


def add_once(state: ServerState, uploads: Mapping[int, Upload]) -> None:
    """Add what clients report to the totals in `state.extra`, in float64 and each client once.

    A client that has reported is in `state.pool`, with an entry that has no tensors.
    """
    for client_id in sorted(uploads.keys() - state.pool.keys()):
        for name, tensor in uploads[client_id].tensors.items():
            before = state.extra.get(name, torch.zeros(tensor.shape, dtype=torch.float64))
            state.extra[name] = before + tensor.double()
        state.pool[client_id] = {}


def log_shares(counts: Tensor) -> Tensor:
    """Return log N_c / N (C,), with a floor for a class without images."""
    return (counts / counts.sum()).clamp_min(SMALLEST_SHARE).log()


def scatter(counts: Tensor, means: Tensor, moment: Tensor) -> Tensor:
    """Return the scatter around the class means (d, d): M - SUM N_c mu_c mu_c'."""
    return moment - (counts[:, None] * means).t() @ means


def shrunk(covariance: Tensor, share: float) -> Tensor:
    """Return (1 - share) S + share tr(S)/d I for covariances S (..., d, d), and a small ridge."""
    identity = torch.eye(covariance.shape[-1]).to(covariance)
    spread = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return (1 - share) * covariance + (share * spread + RIDGE) * identity


def linear(counts: Tensor, means: Tensor, covariance: Tensor) -> dict[str, Tensor]:
    """Return the classifier of N(mu_c, S): w_c = S^-1 mu_c, b_c = log N_c/N - mu_c . w_c / 2."""
    weight = torch.linalg.solve(covariance, means.t()).t().contiguous()
    return {"weight": weight, "bias": log_shares(counts) - (means * weight).sum(-1) / 2}


def fit_lda(counts: Tensor, means: Tensor, moment: Tensor, share: float) -> dict[str, Tensor]:
    """Return the classifier with one covariance for all classes, from M (d, d)."""
    freedom = (counts.sum() - len(counts)).clamp_min(1)
    return linear(counts, means, shrunk(scatter(counts, means, moment) / freedom, share))


def fit_nb(counts: Tensor, means: Tensor, squares: Tensor) -> dict[str, Tensor]:
    """Return the classifier with a diagonal covariance for each class, from SUM_c x^2 (C, d)."""
    mean_squares = squares / counts.clamp_min(1)[:, None]
    curvature = 1 / (mean_squares - means.square()).clamp_min(RIDGE)
    exponent = (means.square() * curvature - curvature.log()).sum(-1) / 2
    bias = log_shares(counts) - exponent
    return {"weight": means * curvature, "bias": bias, "curvature": curvature}


def fit_qda(counts: Tensor, means: Tensor, moments: Tensor, share: float) -> dict[str, Tensor]:
    """Return the classifier with a covariance for each class, from M_c (C, d, d).

    A class with less than two images has the covariance that all classes have in common.
    """
    freedom = (counts.sum() - len(counts)).clamp_min(1)
    common = scatter(counts, means, moments.sum(0)) / freedom
    outer = counts[:, None, None] * means[:, :, None] * means[:, None]
    own = (moments - outer) / (counts - 1).clamp_min(1)[:, None, None]
    covariance = shrunk(torch.where(counts[:, None, None] > 1, own, common), share)
    curvature = torch.linalg.inv(covariance)
    weight = torch.einsum("cde,ce->cd", curvature, means)
    exponent = ((means * weight).sum(-1) + torch.logdet(covariance)) / 2
    return {"weight": weight, "bias": log_shares(counts) - exponent, "curvature": curvature}


def fit(
    kind: str, counts: Tensor, means: Tensor, moments: Tensor, share: float
) -> dict[str, Tensor]:
    """Return the classifier of a kind, "lda", "nb" or "qda", from that kind's moments.

    `share` is how much a covariance is shrunk; nb's never is.
    """
    if kind == "nb":
        return fit_nb(counts, means, moments)
    return (fit_lda if kind == "lda" else fit_qda)(counts, means, moments, share)


def powered(
    own: Mapping[str, Tensor], others: Mapping[str, Tensor], alpha: float
) -> dict[str, Tensor]:
    """Return the statistics of L(own) L(others)^alpha, which are own + alpha others."""
    return {name: own[name] + alpha * others[name].cpu() for name in STATISTICS}


def fit_posterior(statistics: Mapping[str, Tensor], prior: float) -> dict[str, Tensor]:
    """Return lda's classifier with a spherical prior on the covariance, as of nu = prior d images.

    S = (scatter + nu tau I) / (N + nu), tau the mean variance. `statistics`: counts, sums, moments;
    counts may be fractions. The result is float32.
    """
    counts, sums, moment = (statistics[name].double() for name in STATISTICS)
    means, n, nu = class_means(counts, sums), counts.sum(), prior * sums.shape[1]
    covariance = shrunk(scatter(counts, means, moment) / n, float(nu / (n + nu)))
    return {name: t.float() for name, t in linear(counts, means, covariance).items()}
