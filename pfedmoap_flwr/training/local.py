"""What clients compute: local training and evaluation. Plain PyTorch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pfedmoap_flwr.methods.base import Head, Method, Received
from pfedmoap_flwr.randomness import torch_generator
from pfedmoap_flwr.training.stacked import IGNORED, Stack

EVALUATION_BATCH = 1024


@dataclass(frozen=True, eq=False)
class Split:
    """One client's part of a split: features (n, d) and labels (n,)."""

    features: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Training:
    """What one client trains: its head, its images, what it received (on the head's device)."""

    client: int
    head: Head
    data: Split
    received: Received


def train(
    method: Method, trainings: Sequence[Training], server_round: int
) -> dict[int, float | None]:
    """Train heads in place for the local epochs; return each client's mean loss of the last one.

    The order of a client's images is a function of (seed, client, round). None: nothing moved.
    Several heads must be of one kind (`stacked.kind`); they move in the same steps, each by its
    own loss. A client that has fewer batches rests until the next epoch.
    """
    settings = method.settings
    # Those that still have a batch are always the first ones
    trainings = sorted(trainings, key=lambda t: -len(t.data))
    stack = stacked(method, trainings)
    epoch_of = _Epochs(trainings, settings.batch_size, settings.seed, server_round)
    losses: list[float | None] = [None] * len(trainings)
    for head in stack.heads:
        head.train()
    for epochs, names in method.schedule(stack.heads[0], settings.local_epochs):
        moving = {n: ps for n, ps in stack.parameters.items() if n in names}
        if not moving:
            continue
        for name, parameters in stack.parameters.items():
            for parameter in parameters:
                parameter.requires_grad_(name in moving)
        groups = [{"params": parameters, "name": name} for name, parameters in moving.items()]
        optimizer = torch.optim.SGD(groups, lr=settings.lr, **method.sgd())
        for epoch in range(epochs):
            for group in optimizer.param_groups:
                group["lr"] = method.lr(group["name"], epoch, epochs)
            total = torch.zeros(len(trainings), device=trainings[0].data.labels.device)
            for features, labels, sizes in epoch_of.batches():
                step_losses = stack.losses(features, labels)
                optimizer.zero_grad()
                step_losses.sum().backward()
                optimizer.step()
                total[: len(sizes)] += step_losses.detach() * sizes
        sums = total.tolist()
        losses = [s / len(t.data) for s, t in zip(sums, trainings, strict=True)]
    return {t.client: loss for t, loss in zip(trainings, losses, strict=True)}


def stacked(method: Method, trainings: Sequence[Training]) -> Stack:
    """Return the heads of trainings side by side."""
    heads = [training.head for training in trainings]
    return Stack(method, heads, [training.received for training in trainings])


def first_images(trainings: Sequence[Training], count: int) -> tuple[Tensor, Tensor]:
    """Return features (A, count, ...) and labels (A, count); short of images, they repeat."""
    chosen = [(t.data, torch.arange(count) % len(t.data)) for t in trainings]
    features = torch.stack([data.features[rows.to(data.labels.device)] for data, rows in chosen])
    labels = torch.stack([data.labels[rows.to(data.labels.device)] for data, rows in chosen])
    return features, labels


class _Epochs:
    """The batches of clients in step, each client's images in an order of its own."""

    def __init__(
        self, trainings: Sequence[Training], batch_size: int, seed: int, server_round: int
    ) -> None:
        self.sizes = [len(training.data) for training in trainings]
        self.batch_size = batch_size
        self.features = torch.cat([training.data.features for training in trainings])
        self.labels = torch.cat([training.data.labels for training in trainings])
        self.generators = [
            torch_generator(seed, "batches", training.client, server_round)
            for training in trainings
        ]

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield a step's features (A, b, ...), labels (A, b), sizes (A,) for A clients at work.

        Where a client has fewer than b images left, the rest have the label that no loss counts.
        Rows are drawn and moved once an epoch, so that no step waits for the device.
        """
        device = self.labels.device
        steps = -(-max(self.sizes) // self.batch_size)
        rows = torch.full((len(self.sizes), steps * self.batch_size), -1)
        start = 0
        for client, (size, generator) in enumerate(zip(self.sizes, self.generators, strict=True)):
            rows[client, :size] = start + torch.randperm(size, generator=generator)
            start += size
        counts = (rows >= 0).view(len(rows), steps, self.batch_size).sum(dim=2)
        weights = counts.to(device, torch.float32)
        rows = rows.to(device)
        for step in range(steps):
            active = int((counts[:, step] > 0).sum())
            width = int(counts[:, step].max())
            first = step * self.batch_size
            chosen = rows[:active, first : first + width]
            labels = self.labels[chosen.clamp(min=0)].masked_fill(chosen < 0, IGNORED)
            yield self.features[chosen.clamp(min=0)], labels, weights[:active, step]


@torch.no_grad()
def accuracies(head: Head, splits: Mapping[str, Split]) -> dict[str, float]:
    """Return, by split, the share of images whose largest logit is their label.

    Prompts are encoded once for all splits; a split without images has no accuracy.
    """
    head.eval()
    encoded = head.encode()
    return {name: _accuracy(head, encoded, data) for name, data in splits.items() if len(data)}


def _accuracy(head: Head, encoded: Any, data: Split) -> float:
    right = torch.zeros((), dtype=torch.long, device=data.labels.device)
    for start in range(0, len(data), EVALUATION_BATCH):
        part = slice(start, start + EVALUATION_BATCH)
        predicted = head.classify(data.features[part], encoded).argmax(dim=1)
        right += (predicted == data.labels[part]).sum()
    return int(right) / len(data)
