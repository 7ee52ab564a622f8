"""A prompt that is to say the same to a whole text tower and to a part of it (after FedSP)."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Encode = Callable[[Tensor], Tensor]
"""From a context to text features (C, d)."""


def apart(text_features: Tensor, others: Tensor) -> Tensor:
    """Return how far apart two towers' text features (C, d) are, in what tells classes apart.

        mean_c 1 - cos(a_c - mean a, b_c - mean b)

    What is common to all classes is left out: it adds the same to every logit of an image.
    """
    first, second = (F.normalize(t - t.mean(0), dim=-1) for t in (text_features, others))
    return 1 - (first * second).sum(-1).mean()


def told_to_both(ctx: Tensor, whole: Encode, part: Encode, steps: int, lr: float) -> Tensor:
    """Return a context that the whole tower reads as the part of it reads `ctx`.

    `steps` of gradient descent on (apart(whole(v), part(ctx)) + apart(part(v), part(ctx))) / 2
    from v = ctx. The second half keeps what the part of the tower knows already.
    """
    moved = ctx.detach().clone().requires_grad_()
    target = part(moved).detach()
    for _ in range(steps):
        loss = (apart(whole(moved), target) + apart(part(moved), target)) / 2
        (gradient,) = torch.autograd.grad(loss, moved)
        moved = (moved - lr * gradient).detach().requires_grad_()
    return moved.detach()
