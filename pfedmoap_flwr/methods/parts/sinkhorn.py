"""Unbalanced optimal transport between patches and prompts (FedOTP, CVPR 2024, Section 3.3)."""

import math

import torch
from torch import Tensor


@torch.no_grad()
def transport_plan(similarity: Tensor, eps: float, gamma: float, iterations: int) -> Tensor:
    """Return the plan T (..., M, N) for similarities (..., M, N) of M patches and N prompts.

    It minimises SUM T (1 - similarity) - eps entropy(T), where a patch gives at most 1/M and every
    prompt takes gamma/N, by Dykstra's scaling: with K = exp(-(1 - similarity) / eps) and v = 1,
    repeat u = min((1/M) / K v, 1), v = (gamma/N) / K' u; T = diag(u) K diag(v). In logarithms,
    because K underflows where eps is small. The number of iterations is fixed: a rule that stops
    early would make one image's plan depend on the others of its batch.
    """
    log_k = (similarity - 1) / eps
    log_a = -math.log(similarity.shape[-2])
    log_b = math.log(gamma / similarity.shape[-1])
    log_v = torch.zeros_like(log_k[..., :1, :])
    log_u = torch.zeros_like(log_k[..., :1])
    for _ in range(iterations):
        log_u = (log_a - (log_k + log_v).logsumexp(-1, keepdim=True)).clamp(max=0)
        log_v = log_b - (log_k + log_u).logsumexp(-2, keepdim=True)
    return (log_u + log_k + log_v).exp()
