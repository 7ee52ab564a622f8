"""Many clients in one step: heads that are alike are stacked, their losses taken by vmap.

A client's loss depends on its own head and images alone, so the gradient of the sum of losses is
each client's own gradient: the same training as one by one, up to float error, in larger products.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from pfedmoap_flwr.methods.base import Head, Method, Tensors, Work

IGNORED = -100
"""The label of a row that fills up a batch; PyTorch's losses do not count it."""

# By how much another order of summation may change a loss; a wrong loss is further off
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def likeness(method: Method[Any, Any], work: Work[Any]) -> Hashable:
    """Return what must be equal for heads to be stacked: all names and shapes, and the phases."""
    head = work.head
    shapes = [
        tuple(sorted((name, tuple(t.shape), str(t.dtype)) for name, t in tensors))
        for tensors in (head.named_parameters(), head.named_buffers(), work.received.items())
    ]
    phases = method.schedule(head, method.settings.local_epochs)
    return type(head), *shapes, tuple(phases)


class Stack:
    """Heads that are alike, side by side; of one head, the head itself."""

    def __init__(self, method: Method[Any, Any], works: Sequence[Work[Any]]) -> None:
        self.method = method
        self.heads: list[Head] = [work.head for work in works]
        self.received = [work.received for work in works]
        own = [dict(head.named_parameters()) for head in self.heads]
        self.parameters: dict[str, list[Tensor]] = {
            name: [tensors[name] for tensors in own] for name in own[0]
        }
        if len(works) > 1:
            self.fixed = _stacked([dict(head.named_buffers()) for head in self.heads])
            self.all_received = _stacked(self.received)

    def losses(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the losses (A,) of the first A heads on features (A, b, ...), labels (A, b)."""
        active = len(labels)
        if active == 1:
            return self.loss_of(0, features[0], labels[0]).unsqueeze(0)
        states = {name: torch.stack(ps[:active]) for name, ps in self.parameters.items()}
        states |= {name: tensor[:active] for name, tensor in self.fixed.items()}
        received = {name: tensor[:active] for name, tensor in self.all_received.items()}
        loss_of = _Loss(self.method, self.heads[0])

        def one(state: Tensors, received: Tensors, features: Tensor, labels: Tensor) -> Tensor:
            named = {f"head.{name}": tensor for name, tensor in state.items()}
            loss: Tensor = functional_call(loss_of, named, (features, labels, received))
            return loss

        losses: Tensor = vmap(one)(states, received, features, labels)
        return losses

    def loss_of(self, number: int, features: Tensor, labels: Tensor) -> Tensor:
        """Return one head's loss on features (b, ...), labels (b,), computed by itself."""
        head, received = self.heads[number], self.received[number]
        return self.method.loss(head, features, labels, received)


def check_stackable(stack: Stack, features: Tensor, labels: Tensor) -> None:
    """Raise ValueError where stacked losses are not each head's own, or write into a buffer.

    `features` (A, 2, ...), `labels` (A, 2) of all A heads of the stack. All but the first head
    leave their second row out, and it is made large, so that a loss that counts it is far off.
    """
    features, labels = features.clone(), labels.clone()
    features[1:, 1] *= 10
    labels[1:, 1] = IGNORED
    before = _versions(stack.heads)
    joint = stack.losses(features, labels)
    rows = [2] + [1] * (len(labels) - 1)
    alone = [stack.loss_of(i, features[i, :n], labels[i, :n]) for i, n in enumerate(rows)]
    tolerance = TOLERANCE[stack.method.clip.precision]
    if not torch.allclose(joint, torch.stack(alone), rtol=tolerance, atol=tolerance):
        raise ValueError("stacked, their losses are not each one's own")
    if _versions(stack.heads) != before:
        raise ValueError("their loss writes into a buffer, which would be lost when stacked")


def _versions(heads: Sequence[Head]) -> list[tuple[int, int]]:
    """Return what changes when a buffer is replaced or written into."""
    return [(id(buffer), buffer._version) for head in heads for buffer in head.buffers()]


class _Loss(nn.Module):
    """A method's loss as a module, the form in which a head's tensors can be exchanged."""

    def __init__(self, method: Method[Any, Any], head: Head) -> None:
        super().__init__()
        self.method = method
        self.head = head

    def forward(self, features: Tensor, labels: Tensor, received: Tensors) -> Tensor:
        return self.method.loss(self.head, features, labels, received)


def _stacked(states: Sequence[Tensors]) -> dict[str, Tensor]:
    return {name: torch.stack([state[name] for state in states]) for name in states[0]}
