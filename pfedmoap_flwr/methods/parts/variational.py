"""Normal distributions over prompts: draws, divergence, what several draws predict together.

With the mean mu and the log variance rho of every entry, independent of each other:

    draw = mu + exp(rho / 2) eps, eps ~ N(0, 1)
    KL(q || p) = SUM (rho_p - rho_q + (exp(rho_q) + (mu_q - mu_p)^2) / exp(rho_p) - 1) / 2

The gradient goes through a draw to mu and rho (Kingma and Welling, ICLR 2014, arXiv 1312.6114).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pfedmoap_flwr.methods.parts.gate import linear
from pfedmoap_flwr.randomness import torch_generator


def draws_of(mean: Tensor, log_var: Tensor, eps: Tensor) -> Tensor:
    """Return draws, of the shape to which mean, log variance and standard-normal eps broadcast."""
    return mean + (log_var / 2).exp() * eps


def divergence(
    mean: Tensor, log_var: Tensor, prior_mean: Tensor | float, prior_log_var: Tensor | float
) -> Tensor:
    """Return KL(q || prior) entry by entry (...), q's mean and log variance (...) first."""
    apart = log_var - prior_log_var
    # expm1: the smallest divergences would drown in the rounding of exp(apart) - 1
    squared = (mean - prior_mean).square() * torch.exp(-torch.as_tensor(prior_log_var))
    return (torch.expm1(apart) - apart + squared) / 2


def log_mean_probability(logits: Tensor) -> Tensor:
    """Return log of the mean over S draws of softmax, (B, C), of logits (S, B, C)."""
    return logits.log_softmax(-1).logsumexp(0) - math.log(len(logits))


def mixture_log_var(means: Tensor, log_vars: Tensor, weights: Tensor) -> Tensor:
    """Return the log variance (...) of a mixture of N normal distributions, entry by entry.

    Its mean is mu = SUM p_i mu_i, its variance SUM p_i (sigma_i^2 + (mu_i - mu)^2); means and log
    variances (N, ...), weights (N,), which add up to whatever.
    """
    p = weights / weights.sum()
    apart = means - torch.tensordot(p, means, dims=1)
    return torch.tensordot(p, log_vars.exp() + apart.square(), dims=1).log()


def fixed_draws(seed: int, *shape: int) -> Tensor:
    """Return eps of a prediction, the same for all clients: a function of the seed."""
    return torch.randn(shape, generator=torch_generator(seed, "draws"))


def draw_every_step(
    optimizer: torch.optim.Optimizer, eps: Tensor, generator: torch.Generator
) -> torch.optim.Optimizer:
    """Return the optimizer, which fills eps with N(0, 1) from now on: at once and at every step."""

    @torch.no_grad()
    def draw(*_: object) -> None:
        eps.copy_(torch.randn(eps.shape, generator=generator))

    draw()
    optimizer.register_step_post_hook(draw)
    return optimizer


def by_parts(function: Callable[[Tensor], Tensor], rows: Tensor, most: int) -> Tensor:
    """Return function(rows), computed for no more than `most` rows at once, forwards and backwards.

    Of several parts no step is kept, but computed a second time on the way back; heads cannot be
    stacked then.
    """
    parts = rows.split(most)
    if len(parts) == 1:
        return function(rows)
    return torch.cat([checkpoint(function, part, use_reentrant=False) for part in parts])


class Distribution(nn.Module):
    """A normal distribution of vectors (width,): one for all images, or each its own (conditional).

    `log_var`: where the log variance starts; one for all starts at random within 1 above it.
    """

    def __init__(
        self,
        width: int,
        embed_dim: int,
        generator: torch.Generator,
        conditional: bool,
        log_var: float,
    ) -> None:
        super().__init__()
        self.mu: nn.Module
        self.log_var: nn.Module
        if conditional:
            self.mu = ImageNetwork(embed_dim, width, generator)
            self.log_var = ImageNetwork(embed_dim, width, generator, log_var)
        else:
            self.mu = Constant(torch.zeros(width))
            self.log_var = Constant(log_var + torch.rand(width, generator=generator))

    def forward(self, x: Tensor, eps: Tensor) -> Tensor:
        """Return draws (B or 1, L, width) for unit-norm images (B, d), by eps (L, width)."""
        return draws_of(self.mu(x)[:, None], self.log_var(x)[:, None], eps)

    def divergence(self, x: Tensor) -> Tensor:
        """Return KL to N(0, I) entry by entry, (B or 1, width), for unit-norm images (B, d)."""
        return divergence(self.mu(x), self.log_var(x), 0.0, 0.0)


class Constant(nn.Module):
    """The same vector for every image."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value)

    def forward(self, image_features: Tensor) -> Tensor:
        """Return (1, width), whatever the image features are."""
        return self.value[None]


class ImageNetwork(nn.Module):
    """From an image feature to a vector (Bayesian Prompt Learning, arXiv 2210.02390).

    W3 ELU(W2 ELU(W1 x)) with biases, d -> d/2 -> d/2 -> width; `shift` is added to the last bias.
    """

    def __init__(
        self, embed_dim: int, width: int, generator: torch.Generator, shift: float = 0.0
    ) -> None:
        super().__init__()
        inner = embed_dim // 2
        self.first = linear(embed_dim, inner, generator)
        self.second = linear(inner, inner, generator)
        self.last = linear(inner, width, generator)
        self.last.bias.data += shift

    def forward(self, image_features: Tensor) -> Tensor:
        """Return (B, width) of unit-norm image features (B, d)."""
        return self.last(F.elu(self.second(F.elu(self.first(image_features)))))
