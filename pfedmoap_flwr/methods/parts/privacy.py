"""Differential privacy of noised gradients: clipping, and what k noised sums reveal together.

A sum of gradients of norm 1 at most, plus N(0, sigma^2) in every entry, is a Gaussian mechanism.
k of them, each of which may depend on all before, reveal as much as one with mu = sqrt(k) / sigma
(Dong, Roth, Su, JRSS-B 2022, arXiv 1905.02383, Corollary 3.3). That one is (epsilon, delta)-private
exactly where (Balle and Wang, ICML 2018, arXiv 1805.06530, Theorem 8), with Phi the normal
distribution function,

    delta >= Phi(mu / 2 - epsilon / mu) - e^epsilon Phi(-mu / 2 - epsilon / mu)

This is tight: accounting by Renyi divergence gives a larger epsilon for the same noise.
"""

import math

import torch
from torch import Tensor

BISECTIONS = 100


def clipped(largest: float, *parts: Tensor) -> tuple[Tensor, ...]:
    """Return parts (B, ...) of B gradients, scaled so that no gradient is longer than `largest`.

    A gradient's length is that of all its parts together.
    """
    lengths = torch.cat([part.flatten(1) for part in parts], dim=1).norm(dim=1)
    scale = (largest / lengths.clamp_min(torch.finfo(lengths.dtype).tiny)).clamp(max=1)
    return tuple(part * scale.view(-1, *[1] * (part.dim() - 1)) for part in parts)


def by_image(losses: Tensor, parameter: Tensor) -> Tensor:
    """Return each image's gradient (B, ...) of its loss, losses (B,), to a parameter (...)."""
    # One backward pass for each image, all in one product; torch.func.grad would forbid the hooks
    # with which the memory of a step is measured
    images = torch.eye(len(losses), dtype=losses.dtype, device=losses.device)
    (gradients,) = torch.autograd.grad(
        losses, parameter, images, retain_graph=True, is_grads_batched=True
    )
    return gradients


def clipped_mean(gradients: Tensor, largest: float) -> Tensor:
    """Return the mean (...) of gradients (B, ...), shortened to `largest` where longer."""
    return clipped(largest, gradients)[0].mean(0)


def privatised(
    losses: Tensor, parameter: Tensor, largest: float, noise: float, generator: torch.Generator
) -> Tensor:
    """Return the mean of losses (B,) with a private gradient for one parameter.

    Its gradient there is the mean of each image's own gradient, clipped, plus
    N(0, (noise largest / B)^2) in every entry (Abadi et al., CCS 2016, arXiv 1607.00133). Every
    other parameter has the usual gradient, and the value is the usual one.
    """
    each = by_image(losses, parameter)
    drawn = gaussian(parameter, noise * largest / len(losses), generator)
    shift = ((clipped_mean(each, largest) + drawn - each.mean(0)) * parameter).sum()
    return losses.mean() + shift - shift.detach()


def gaussian(like: Tensor, std: float, generator: torch.Generator) -> Tensor:
    """Return N(0, std^2) in every entry, of the shape and on the device of `like`."""
    return (std * torch.randn(like.shape, generator=generator)).to(like)


def noised(tensor: Tensor, std: float, generator: torch.Generator) -> Tensor:
    """Return a tensor plus N(0, std^2) in every entry."""
    return tensor + gaussian(tensor, std, generator)


def delta_of(mu: float, epsilon: float) -> float:
    """Return the smallest delta with which a Gaussian mechanism is (epsilon, delta)-private."""
    near, far = (
        float(torch.special.log_ndtr(torch.tensor(x, dtype=torch.float64)))
        for x in (mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu)
    )
    # e^epsilon alone would overflow
    return math.exp(near) - math.exp(epsilon + far)


def epsilon_of(mu: float, delta: float) -> float:
    """Return the smallest epsilon with which a Gaussian mechanism is (epsilon, delta)-private.

    mu: sqrt(k) / sigma of k noised sums; above 0. delta: between 0 and 1.
    """
    low, high = 0.0, mu**2 / 2 + mu * math.sqrt(2 * math.log(1 / delta))
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if delta_of(mu, middle) > delta:
            low = middle
        else:
            high = middle
    return high
