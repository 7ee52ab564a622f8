"""Epochs of local training outside a round: a head is adapted before it is measured."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pfedmoap_flwr.methods.base import Method, Work


def fine_tune(
    method: Method[Any, Any],
    work: Work[Any],
    names: Sequence[str],
    epochs: int,
    loss_of: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Train some parameters of a head on its client's training images.

    Steps and the order of batches are those of local training in this client's round. Rates are
    those of its epochs without `optimizer.lr-schedule`, which at its end would leave none to adapt
    with. The optimizer is a fresh one, and nothing but these parameters changes.

    loss_of: the loss () of features (B, ...) and labels (B,).
    """
    head, images, size = work.head, work.images, method.settings.batch_size
    groups = []
    for name, parameter in head.named_parameters():
        parameter.requires_grad_(name in names)
        groups += [{"name": name, "params": [parameter]}] if name in names else []
    optimizer = method.optimizer(work, groups)
    generator = method.generator("batches", work.client_id, work.round)
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = method.lr(group["name"], epoch, epochs)
        order = torch.randperm(len(images), generator=generator).to(images.labels.device)
        for rows in order.split(size) if len(images) else ():
            optimizer.zero_grad()
            loss_of(images.features[rows], images.labels[rows]).backward()
            optimizer.step()
