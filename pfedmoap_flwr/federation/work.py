"""What a client computes: local training and evaluation. Plain PyTorch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pfedmoap_flwr.methods import Head, Method, Received
from pfedmoap_flwr.randomness import torch_generator

EVALUATION_BATCH = 1024


@dataclass(frozen=True, eq=False)
class Split:
    """One client's part of a split: features (n, d) and labels (n,)."""

    features: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def train(
    method: Method, head: Head, data: Split, received: Received, client: int, server_round: int
) -> float | None:
    """Train a head in place for the local epochs and return the mean loss of the last one.

    The order of images is a function of (seed, client, round). Returns None where nothing moves.
    """
    settings = method.settings
    generator = torch_generator(settings.seed, "batches", client, server_round)
    mean_loss = None
    head.train()
    for epochs, names in method.schedule(head, settings.local_epochs):
        moving = {name: p for name, p in head.named_parameters() if name in names}
        if not moving:
            continue
        for name, parameter in head.named_parameters():
            parameter.requires_grad_(name in moving)
        groups = [{"params": [parameter], "name": name} for name, parameter in moving.items()]
        optimizer = torch.optim.SGD(groups, lr=settings.lr, **method.sgd())
        for epoch in range(epochs):
            for group in optimizer.param_groups:
                group["lr"] = method.lr(group["name"], epoch, epochs)
            order = torch.randperm(len(data), generator=generator).to(data.labels.device)
            total = torch.zeros((), device=data.labels.device)
            for batch in order.split(settings.batch_size):
                loss = method.loss(head, data.features[batch], data.labels[batch], received)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.detach() * len(batch)
            mean_loss = float(total) / len(data)
    return mean_loss


@torch.no_grad()
def accuracies(head: Head, splits: Mapping[str, Split]) -> dict[str, float]:
    """Return, by split, the share of images whose largest logit is their label.

    Prompts are encoded once for all splits; a split without images has no accuracy.
    """
    head.eval()
    encoded = head.encode()
    return {name: _accuracy(head, encoded, data) for name, data in splits.items() if len(data)}


def _accuracy(head: Head, encoded: Any, data: Split) -> float:
    right = 0
    for start in range(0, len(data), EVALUATION_BATCH):
        part = slice(start, start + EVALUATION_BATCH)
        predicted = head.classify(data.features[part], encoded).argmax(dim=1)
        right += int((predicted == data.labels[part]).sum())
    return right / len(data)
