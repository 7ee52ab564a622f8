"""Many clients in one step: heads of one kind are stacked and their losses taken by vmap.

A client's loss depends on its own head and images alone, so the gradient of the sum of losses is
each client's own gradient: the same training as one by one, up to float error, in larger products.
"""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from pfedmoap_flwr.methods.base import Head, Method, Received

IGNORED = -100
"""The label of a row that fills up a batch; PyTorch's losses do not count it."""


def kind(head: Head, received: Received) -> Hashable:
    """Return what heads must have in common to be stacked: names and shapes of all they hold."""
    shapes = [
        {name: (tuple(t.shape), t.dtype) for name, t in tensors}
        for tensors in (head.named_parameters(), head.named_buffers(), received.items())
    ]
    return type(head), *(tuple(sorted(s.items())) for s in shapes)


class Stack:
    """Heads of one kind (`kind`) side by side."""

    def __init__(self, method: Method, heads: Sequence[Head], received: Sequence[Received]) -> None:
        for head in heads:
            head.prepare()
        self.method = method
        self.heads = heads
        self.received_by = received
        own = [dict(head.named_parameters()) for head in heads]
        self.parameters: dict[str, list[Tensor]] = {
            name: [tensors[name] for tensors in own] for name in own[0]
        }
        if len(heads) > 1:
            self.fixed = _stacked([dict(head.named_buffers()) for head in heads])
            self.received = _stacked(received)

    def losses(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the losses (A,) of the first A heads on features (A, b, ...), labels (A, b)."""
        active = len(labels)
        if active == 1:
            head, received = self.heads[0], self.received_by[0]
            return self.method.loss(head, features[0], labels[0], received).unsqueeze(0)
        states = {name: torch.stack(ps[:active]) for name, ps in self.parameters.items()}
        states |= {name: tensor[:active] for name, tensor in self.fixed.items()}
        all_received = {name: tensor[:active] for name, tensor in self.received.items()}
        loss_of = _Loss(self.method, self.heads[0])

        def one(state: Received, received: Received, features: Tensor, labels: Tensor) -> Tensor:
            named = {f"head.{name}": tensor for name, tensor in state.items()}
            loss: Tensor = functional_call(loss_of, named, (features, labels, received))
            return loss

        losses: Tensor = vmap(one)(states, all_received, features, labels)
        return losses


def check_stackable(stack: Stack, features: Tensor, labels: Tensor) -> None:
    """Raise ValueError where two heads' stacked losses are not each head's own.

    `features` (2, 2, ...), `labels` (2, 2); the second head's last row is left out of its loss.
    """
    labels = labels.clone()
    labels[1, 1] = IGNORED
    joint = stack.losses(features, labels)
    second = stack.method.loss(stack.heads[1], features[1, :1], labels[1, :1], stack.received_by[1])
    first = stack.losses(features[:1], labels[:1])
    if not torch.allclose(joint, torch.stack([first[0], second]), rtol=1e-2):
        raise ValueError("stacked, their losses are not each one's own")


def saved_bytes(stack: Stack, features: Tensor, labels: Tensor, without: set[int]) -> int:
    """Return the bytes that one step keeps for its backward pass; `without` are storages' places.

    It depends on shapes alone, so it is the same on every run.
    """
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        stack.losses(features, labels)
    return sum(size for place, size in sizes.items() if place not in without)


class _Loss(nn.Module):
    """A method's loss as a module, the form in which a head's tensors can be exchanged."""

    def __init__(self, method: Method, head: Head) -> None:
        super().__init__()
        self.method = method
        self.head = head

    def forward(self, features: Tensor, labels: Tensor, received: Received) -> Tensor:
        return self.method.loss(self.head, features, labels, received)


def _stacked(states: Sequence[Received]) -> dict[str, Tensor]:
    return {name: torch.stack([state[name] for state in states]) for name in states[0]}
