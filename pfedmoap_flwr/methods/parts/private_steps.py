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

from pfedmoap_flwr.methods.parts.factors import factorise, whole_gradient
from pfedmoap_flwr.methods.parts.privacy import by_image, clipped, epsilon_of, gaussian

LossesOf = Callable[[Tensor], Tensor]


def released_noise(rounds: int, delta: float, epsilon: float) -> float:
    """Return the released code's noise for T rounds: sqrt(T ln(1 / delta)) / epsilon."""
    return math.sqrt(rounds * math.log(1 / delta)) / epsilon


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
        self, losses_of: LossesOf, ctx: Tensor, local: Tensor, start: Tensor, labels: Tensor
    ) -> Tensor:
        """Return the images' mean loss (), whose gradients to ctx and local are the clipped ones.

        losses_of: the losses (B,) of a prompt (M, D), 0 where a label (B,) is below 0.
        """
        prompt = (ctx + local).detach().requires_grad_()
        losses = losses_of(prompt)
        gradients = by_image(losses, prompt)
        images = (labels >= 0).sum()
        with torch.no_grad():
            u, v = factorise(local, start)
            if self.released:
                mean = gradients.sum(0, keepdim=True) / images
                parts = [clipped(self.clip_norm, g)[0][0] for g in (mean, mean @ v.mT, u.mT @ mean)]
            else:
                three = clipped(self.clip_norm, gradients, gradients @ v.mT, u.mT @ gradients)
                parts = [part.sum(0) / self.batch_size for part in three]
            of_ctx, of_u, of_v = parts
            of_local = whole_gradient(of_u, of_v, u, v, self.released)
        # Each is 0 and has the gradient that is wanted
        carried = ((ctx - ctx.detach()) * of_ctx).sum()
        carried = carried + ((local - local.detach()) * of_local).sum()
        return losses.detach().sum() / images + carried

    def watch(
        self,
        optimizer: torch.optim.Optimizer,
        ctx: Tensor,
        local: Tensor,
        start: Tensor,
        steps: Tensor,
        generator: torch.Generator,
    ) -> torch.optim.Optimizer:
        """Return the optimizer, which adds noise before every step and counts it in `steps` ()."""

        def before_step(*_: Any) -> None:
            self.add_noise(ctx, local, start, generator)
            steps.add_(1)

        optimizer.register_step_pre_hook(before_step)
        return optimizer

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
