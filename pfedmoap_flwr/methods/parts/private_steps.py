"""Steps of SGD on ctx + local whose gradients are clipped image by image, and noised (DP-FPL).

With g_i the gradient of image i's loss to the prompt, u and v the factors of local, C the clip norm
and L the batch size, what a step takes of the images is

    (g_i, g_i v', u' g_i), clipped to C together;  their sums / L + N(0, (noise C / L)^2)

for ctx, u and v; `local` moves by what those of u and v tell. An image that is left out changes the
three sums by C at the most, whatever ctx, local and the factors are, so a step is one Gaussian
mechanism of sigma = noise.

"released" is DP-FPL's public code: the batch's mean gradients to ctx, u and v, each clipped to C,
and noise on those of u and v alone. An image that is left out may change each of them by 2 C.

Shapes: B batch, M context tokens, D text width; a leading C where contexts are class-specific.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from pfedmoap_flwr.methods.parts.factors import factorise, whole_gradient
from pfedmoap_flwr.methods.parts.privacy import clipped, epsilon_of, gaussian

LossOfOne = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class PrivateSteps:
    """How gradients are clipped and noised; the noise counts in clip norms."""

    clip_norm: float
    noise: float
    batch_size: int
    released: bool

    @property
    def std(self) -> float:
        """The noise's standard deviation in a gradient: noise C / L."""
        return self.noise * self.clip_norm / self.batch_size

    def epsilon(self, steps: int, images: int, delta: float) -> float | None:
        """Return a client's epsilon after so many steps over its images; None: not bounded.

        An image is in one step of an epoch. So epochs count, whatever the number of images.
        """
        if self.released or not self.noise:
            return None
        epochs = steps / math.ceil(images / self.batch_size)
        return epsilon_of(math.sqrt(epochs) / self.noise, delta)

    def loss(
        self,
        loss_of: LossOfOne,
        ctx: Tensor,
        local: Tensor,
        start: Tensor,
        features: Tensor,
        labels: Tensor,
    ) -> Tensor:
        """Return the images' mean loss (), whose gradients to ctx and local are the clipped ones.

        loss_of: loss of (prompt (M, D), one image's features, its label), 0 for a label below 0.
        """
        with torch.no_grad():
            each: Any = vmap(grad_and_value(loss_of), in_dims=(None, 0, 0))
            gradients, losses = each(ctx + local, features, labels)
            mean_loss = losses.sum() / (labels >= 0).sum()
            u, v = factorise(local, start)
            if self.released:
                mean = gradients.sum(0, keepdim=True) / (labels >= 0).sum()
                parts = [clipped(self.clip_norm, g)[0][0] for g in (mean, mean @ v.mT, u.mT @ mean)]
            else:
                three = clipped(self.clip_norm, gradients, gradients @ v.mT, u.mT @ gradients)
                parts = [part.sum(0) / self.batch_size for part in three]
            of_ctx, of_u, of_v = parts
            of_local = whole_gradient(of_u, of_v, u, v, self.released)
        # Each is 0 and has the gradient that is wanted
        carried = ((ctx - ctx.detach()) * of_ctx).sum()
        return mean_loss + carried + ((local - local.detach()) * of_local).sum()

    @torch.no_grad()
    def add_noise(
        self, ctx: Tensor, local: Tensor, start: Tensor, generator: torch.Generator
    ) -> None:
        """Add noise to what `loss` left as the gradients of ctx and local."""
        assert ctx.grad is not None
        assert local.grad is not None
        u, v = factorise(local, start)
        of_ctx, of_u, of_v = (gaussian(like, self.std, generator) for like in (ctx, u, v))
        local.grad += whole_gradient(of_u, of_v, u, v, self.released)
        if not self.released:
            ctx.grad += of_ctx
