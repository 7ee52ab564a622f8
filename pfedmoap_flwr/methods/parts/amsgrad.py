"""AMSGrad as FedLALR (arXiv 2309.09719, Algorithm 1) has it, whose moments can travel.

A step on a parameter x with gradient g, without bias correction and without a constant in the
denominator:

    m <- b1 m + (1 - b1) g,     v <- b2 v + (1 - b2) g^2
    vhat <- max(vhat, v),       x <- x - lr m / sqrt(vhat)

m starts at 0, vhat at eps^2. Both lie in the head, beside what they are moments of: `m.ctx` and
`vhat.ctx` for `ctx`.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

KINDS = ("m", "vhat")


class Moments(nn.Module):
    """A buffer for each parameter of a module, of the same name and shape."""

    def __init__(self, module: nn.Module, start: float) -> None:
        super().__init__()
        for name, parameter in module.named_parameters(recurse=False):
            self.register_buffer(name, torch.full_like(parameter, start, requires_grad=False))
        for name, child in module.named_children():
            if any(True for _ in child.parameters()):
                self.add_module(name, Moments(child, start))


def add_moments(head: nn.Module, eps: float) -> None:
    """Give a head the moments of all its parameters, as they are before the first step."""
    m, vhat = Moments(head, 0.0), Moments(head, eps**2)
    head.m, head.vhat = m, vhat


def names_of_moments(names: Iterable[str]) -> list[str]:
    """Return what the moments of these parameters are called."""
    return [f"{kind}.{name}" for name in names for kind in KINDS]


def moments(head: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Return a CPU copy of a head's moments by these names of theirs."""
    return {name: head.get_buffer(name).detach().cpu().clone() for name in names}


class AMSGrad(torch.optim.Optimizer):
    """Moves one tensor a group, {"name": str, "params": [x]}, and changes its moments in place.

    moments: m and vhat by a group's name. v stays with the client: it starts at the vhat that
    came, as in the public code. From zero it could not exceed vhat for many steps.

    Raises ValueError where a moment's shape is not its parameter's.
    """

    def __init__(
        self,
        groups: ParamsT,
        moments: Mapping[str, tuple[Tensor, Tensor]],
        beta1: float,
        beta2: float,
    ) -> None:
        super().__init__(groups, {"lr": 0.0})
        self.beta1, self.beta2 = beta1, beta2
        self.moments = {group["name"]: moments[group["name"]] for group in self.param_groups}
        self.v = {name: vhat.clone() for name, (_, vhat) in self.moments.items()}
        for group in self.param_groups:
            (x,) = group["params"]
            for kind, moment in zip(KINDS, self.moments[group["name"]], strict=True):
                if moment.shape != x.shape:
                    came, own = tuple(moment.shape), tuple(x.shape)
                    raise ValueError(f"{kind}.{group['name']} has shape {came}, not {own}")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step; what has no gradient stays, and its moments too."""
        for group in self.param_groups:
            (x,) = group["params"]
            if x.grad is None:
                continue
            (m, vhat), v = self.moments[group["name"]], self.v[group["name"]]
            m.lerp_(x.grad, 1 - self.beta1)
            v.lerp_(x.grad.square(), 1 - self.beta2)
            vhat.copy_(torch.maximum(vhat, v))
            x.sub_(group["lr"] * m / vhat.sqrt())


def amsgrad(groups: ParamsT, head: nn.Module, beta1: float, beta2: float) -> AMSGrad:
    """Return AMSGrad over the moments that lie in a head."""
    of_head = {
        name: (head.get_buffer(f"m.{name}"), head.get_buffer(f"vhat.{name}"))
        for name, _ in head.named_parameters()
    }
    return AMSGrad(groups, of_head, beta1, beta2)
