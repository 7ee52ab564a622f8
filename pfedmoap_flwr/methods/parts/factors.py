"""Low-rank factors of a matrix, through which its gradient is taken.

Reparametrised gradient perturbation (Yu et al., ICML 2021, arXiv 2106.09352): X (M, D)
is written as u v + residual by one step of power iteration from v0 (D, r),

    u = orthonormal(X v0) (M, r),     v = orthonormal(X' u)' (r, D)

and what is known of its gradient g are the two small matrices g_u = g v' and g_v = u' g, from which

    g_u v + u g_v - u u' g_u v

gives back the part of g whose rows lie in v or whose columns lie in u.
"""

import torch
from torch import Tensor


def factorise(matrix: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Return u (..., M, r) and v (..., r, D) of a matrix (..., M, D), from start (..., D, r)."""
    u = orthonormal(matrix @ start)
    return u, orthonormal(matrix.mT @ u).mT


def orthonormal(columns: Tensor) -> Tensor:
    """Return what Gram and Schmidt make of columns (..., n, r), r <= n, in their order."""
    q, r = torch.linalg.qr(columns)
    # QR leaves the sign of each column open
    return q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).unsqueeze(-2).to(q)


def whole_gradient(
    of_u: Tensor, of_v: Tensor, u: Tensor, v: Tensor, released: bool = False
) -> Tensor:
    """Return the gradient (..., M, D) that g_u (..., M, r) and g_v (..., r, D) tell of.

    "released": as in DP-FPL's public code, with a plus in place of the minus, and divided by 10.
    """
    twice = u @ (u.mT @ of_u @ v)
    once = of_u @ v + u @ of_v
    return (once + twice) / 10 if released else once - twice
