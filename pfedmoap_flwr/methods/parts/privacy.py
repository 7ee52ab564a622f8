"""Per-sample differential privacy (DP-SGD, Abadi et al., CCS 2016, arXiv 1607.00133)."""

import torch
from torch import Tensor


def clipped_mean(gradients: Tensor, clip: float) -> Tensor:
    """Return the mean (...) of gradients (B, ...), each shortened to the length `clip` at most."""
    lengths = gradients.flatten(1).norm(dim=1).clamp_min(1e-12)
    factors = (clip / lengths).clamp(max=1)
    return torch.einsum("b,b...->...", factors, gradients) / len(gradients)


def privatised(
    losses: Tensor, parameter: Tensor, clip: float, noise: float, draws: torch.Generator
) -> Tensor:
    """Return the mean of losses (B,) with a private gradient for one parameter.

    Its gradient there is the mean of each image's own gradient, clipped, plus
    N(0, (noise clip / B)^2). Every other parameter has the usual gradient, and the value is the
    usual one.
    """
    each = torch.autograd.grad(
        losses,
        parameter,
        torch.eye(len(losses), dtype=losses.dtype, device=losses.device),
        retain_graph=True,
        is_grads_batched=True,
    )[0]
    drawn = torch.randn(parameter.shape, generator=draws).to(parameter)
    private = clipped_mean(each, clip) + noise * clip / len(losses) * drawn
    shift = ((private - each.mean(0)) * parameter).sum()
    return losses.mean() + shift - shift.detach()
