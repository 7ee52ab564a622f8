"""Local training in which one image can hardly be noticed: DP-SGD, for methods with the usual loss.

With g_i the gradient of image i's cross-entropy to all that moves, C the clip norm, z the noise and
L the batch size, a step takes (Abadi et al., CCS 2016, arXiv 1607.00133, Algorithm 1)

    (SUM_i g_i min(1, C / |g_i|) + N(0, (z C)^2)) / L

Shared and personal parameters are clipped and noised together: a personal one that knew an image
would tell of it through the shared ones of the next round. An image is in one step of an epoch, and
one without it changes the sum by C at the most. So k epochs are k Gaussian mechanisms.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.optimizer import ParamsT

from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.base import H, Method, S, Split, Tensors, Work
from pfedmoap_flwr.methods.parts.privacy import by_image_of, clipped, gaussian
from pfedmoap_flwr.methods.settings import LearningSettings


class PrivateSGD(Method[S, H]):
    """What DP-SGD changes of a method; a base class beside it."""

    def prepare(self, work: Work[H]) -> None:
        """Give the head its source of noise, one for all steps of a round: none is drawn twice."""
        super().prepare(work)
        secret = self.settings.privacy.secret_noise
        draws = None if secret else self.generator("privacy", work.client_id, work.round)
        work.head.draws = draws  # type: ignore[assignment]

    def loss(self, head: H, features: Tensor, labels: Tensor, received: Tensors) -> Tensor:
        """Return the images' mean loss (), whose gradient is the sum of the clipped ones / L."""
        losses = F.cross_entropy(head(features), labels, reduction="none")
        moving = [p for p in head.parameters() if p.requires_grad]
        parts = clipped(self.settings.privacy.clip_norm, *by_image_of(losses, moving))
        value = losses.detach().sum() / (labels >= 0).sum()
        for parameter, part in zip(moving, parts, strict=True):
            # It is 0 and has the gradient that is wanted
            value = value + ((parameter - parameter.detach()) * part.sum(0)).sum() / self._images
        return value

    def optimizer(self, work: Work[H], groups: ParamsT) -> torch.optim.Optimizer:
        """Return the default, which adds noise before every step."""
        optimizer, privacy = super().optimizer(work, groups), self.settings.privacy
        std, draws = privacy.noise * privacy.clip_norm / self._images, work.head.draws

        def before_step(*_: Any) -> None:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad += gaussian(parameter, std, draws)  # type: ignore[arg-type]

        optimizer.register_step_pre_hook(before_step)
        return optimizer

    @property
    def _images(self) -> int:
        return self.settings.batch_size


def private(kind: type[Method[Any, Any]], settings: LearningSettings) -> type[Method[Any, Any]]:
    """Return the class of a method, whose steps are private where privacy.unit=example.

    Raises UsageError where they would not be.
    """
    if settings.privacy.unit != "example":
        return kind
    if reason := _unsuited(kind):
        raise UsageError(
            f"setting privacy.unit='example' cannot be used with {kind.__name__}, {reason}; "
            "dp_fpl and fedsept have steps of their own that are private"
        )
    return type(kind.__name__, (PrivateSGD, kind), {"__module__": kind.__module__})


def _unsuited(kind: type[Method[Any, Any]]) -> str:
    """Return why steps of a class cannot be made private here, or ""."""
    own = [
        name for name in ("loss", "optimizer") if getattr(kind, name) is not getattr(Method, name)
    ]
    if own:
        return f"which has its own {' and '.join(own)}"
    if kind.upload is not Method.upload or kind.reports is not Method.reports:
        return "which uploads more than what it trains"
    return ""


def check_private(method: Method[Any, Any]) -> None:
    """Raise UsageError where images come into a head by another way than its steps."""
    if method.settings.privacy.unit != "example":
        return
    name = f"setting privacy.unit='example' cannot be used with {type(method).__name__}"

    def refuse(split: str) -> Split:
        raise UsageError(f"{name}, which looks at images before it trains")

    head, state = method.build(), method.start()
    if not [names for _, names in method.schedule(head, 1) if names] or not list(head.parameters()):
        raise UsageError(f"{name}, which trains nothing")
    (sent,) = method.send(state, [0], train=True).values()
    head.load(sent)
    method.prepare(Work(0, 1, head, refuse, sent))
