"""Differential privacy of noised sums: clipping, noise, and what k of them reveal together.

A sum of gradients, or of clients' updates, of norm 1 at most, plus N(0, sigma^2) in every entry, is
a Gaussian mechanism. k of them, each of which may depend on all before, reveal as much as one with
mu = sqrt(k) / sigma (Dong, Roth, Su, JRSS-B 2022, arXiv 1905.02383, Corollary 3.3). That one is
(epsilon, delta)-private exactly where (Balle and Wang, ICML 2018, arXiv 1805.06530, Theorem 8),
with Phi the normal distribution function,

    delta >= Phi(mu / 2 - epsilon / mu) - e^epsilon Phi(-mu / 2 - epsilon / mu)

This is tight: accounting by Renyi divergence gives a larger epsilon for the same noise.
"""

import math
import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

BISECTIONS = 100
# Images whose backward passes are one product: more would not stay in a processor's cache
TOGETHER = 8
MOST_SUMS = 10**9


def clipped(largest: float, *parts: Tensor) -> tuple[Tensor, ...]:
    """Return parts (B, ...) of B gradients, scaled so that no gradient is longer than `largest`.

    A gradient's length is that of all its parts together.
    """
    lengths = torch.cat([part.flatten(1) for part in parts], dim=1).norm(dim=1)
    scale = (largest / lengths.clamp_min(torch.finfo(lengths.dtype).tiny)).clamp(max=1)
    return tuple(part * scale.view(-1, *[1] * (part.dim() - 1)) for part in parts)


def clipped_update(largest: float, update: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an update, all its tensors together scaled to a length of `largest` where longer."""
    parts = clipped(largest, *(tensor.reshape(1, -1) for tensor in update.values()))
    return {n: part.view_as(t) for (n, t), part in zip(update.items(), parts, strict=True)}


def by_image(losses: Tensor, parameter: Tensor) -> Tensor:
    """Return each image's gradient (B, ...) of its loss, losses (B,), to a parameter (...)."""
    (gradients,) = by_image_of(losses, [parameter])
    return gradients


def by_image_of(losses: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return each image's gradients (B, ...) to several parameters; 0 for one without a say."""
    # One backward pass for each image, some in one product; torch.func.grad would forbid the hooks
    # with which the memory of a step is measured
    images = torch.eye(len(losses), dtype=losses.dtype, device=losses.device).split(TOGETHER)
    found = [
        torch.autograd.grad(
            losses, parameters, some, retain_graph=True, is_grads_batched=True, allow_unused=True
        )
        for some in images
    ]
    return [
        parameter.new_zeros(len(losses), *parameter.shape)
        if gradients[0] is None
        else torch.cat(gradients)
        for parameter, gradients in zip(parameters, zip(*found, strict=True), strict=True)
    ]


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


def gaussian(like: Tensor, std: float, generator: torch.Generator | None) -> Tensor:
    """Return N(0, std^2) in every entry, of the shape and on the device of `like`.

    generator: None draws from the operating system, which nobody can repeat.
    """
    if generator is None:
        return (std * secret_normal(like.shape)).to(like)
    return (std * torch.randn(like.shape, generator=generator)).to(like)


def secret_normal(shape: torch.Size) -> Tensor:
    """Return N(0, 1) in every entry, float64, of the operating system's own random bytes.

    A generator of PyTorch will not do: on the CPU it keeps 32 bits of its seed, so that whoever
    sees the noised numbers can try all seeds and take the noise off.
    """
    count = math.prod(shape)
    words = torch.frombuffer(bytearray(os.urandom(8 * count or 8)), dtype=torch.int64)[:count]
    # 53 bits: the middles of 2^53 equal parts of (0, 1)
    uniform = ((words & (2**53 - 1)).double() + 0.5) * 2.0**-53
    return torch.special.ndtri(uniform).view(shape)


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


def epsilon_after(sums: int, noise: float, delta: float) -> float:
    """Return the epsilon of so many noised sums, each of norm 1 at most and of std `noise`."""
    if not sums:
        return 0.0
    return epsilon_of(math.sqrt(sums) / noise, delta) if noise else math.inf


def sums_within(epsilon: float, noise: float, delta: float) -> int:
    """Return how many noised sums cost no more than epsilon; 10^9 at the most."""
    fitting, too_many = 0, MOST_SUMS + 1
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        if epsilon_after(middle, noise, delta) <= epsilon:
            fitting = middle
        else:
            too_many = middle
    return fitting
