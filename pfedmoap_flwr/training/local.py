"""What a client computes: local training and evaluation. Plain PyTorch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pfedmoap_flwr.clip.features import read_blank
from pfedmoap_flwr.clip.load import FrozenClip
from pfedmoap_flwr.data.federated import Task
from pfedmoap_flwr.methods.base import Head, Method, Phase, Split, Work
from pfedmoap_flwr.training.stacked import IGNORED, Stack


def train(
    method: Method[Any, Any], works: Sequence[Work[Any]], phases: Sequence[Phase] | None = None
) -> dict[int, float | None]:
    """Train heads in place, by the method's schedule or the phases given.

    Return each client's mean loss of its last epoch by client id; None: nothing moved. The order of
    a client's images is a function of (seed, client, round).

    Several heads must be alike (`stacked.likeness`): they move in the same steps, each by its own
    loss, and a client that has fewer batches rests until the next epoch.
    """
    # By size, so that in every step the clients which still have a batch are the first ones
    works = sorted(works, key=lambda work: -len(work.images))
    stack = Stack(method, works)
    if phases is None:
        phases = method.schedule(works[0].head, method.settings.local_epochs)
    batches = _Batches(method, works)
    losses: list[float | None] = [None] * len(works)
    for work in works:
        work.head.train()
    for epochs, names in phases:
        moving = {name: ps for name, ps in stack.parameters.items() if name in names}
        if not moving or not epochs:
            continue
        for name, parameters in stack.parameters.items():
            for parameter in parameters:
                parameter.requires_grad_(name in moving)
        optimizers = _optimizers(method, works, moving)
        for epoch in range(epochs):
            for group in (group for each in optimizers for group in each.param_groups):
                group["lr"] = works[0].rate * method.lr(group["name"], epoch, epochs)
            totals = _one_epoch(stack, optimizers, batches)
        losses = [total / len(w.images) for total, w in zip(totals, works, strict=True)]
    return {work.client_id: loss for work, loss in zip(works, losses, strict=True)}


def _one_epoch(
    stack: Stack, optimizers: Sequence[torch.optim.Optimizer], batches: "_Batches"
) -> list[float]:
    """Move the heads through all their batches once; return each one's sum of losses."""
    totals = torch.zeros(len(stack.heads), device=batches.labels.device)
    for features, labels, sizes in batches.epoch():
        losses = stack.losses(features, labels)
        # One optimizer for all, or one each. A head without a batch has no gradient: it stays
        active = optimizers if len(optimizers) == 1 else optimizers[: len(sizes)]
        for optimizer in active:
            optimizer.zero_grad()
        losses.sum().backward()
        for optimizer in active:
            optimizer.step()
        totals[: len(sizes)] += losses.detach() * sizes
    return totals.tolist()


def _optimizers(
    method: Method[Any, Any],
    works: Sequence[Work[Any]],
    moving: Mapping[str, Sequence[Tensor]],
) -> list[torch.optim.Optimizer]:
    """Return one optimizer for each head, or a single one for all where it is the default SGD."""
    moments_of_each = method.settings.optimizer.name == "amsgrad"
    if type(method).optimizer is Method.optimizer and not moments_of_each:
        groups = [{"name": name, "params": list(ps)} for name, ps in moving.items()]
        return [method.optimizer(works[0], groups)]
    return [
        method.optimizer(work, [{"name": name, "params": [ps[i]]} for name, ps in moving.items()])
        for i, work in enumerate(works)
    ]


def first_images(works: Sequence[Work[Any]], count: int) -> tuple[Tensor, Tensor]:
    """Return features (A, count, ...) and labels (A, count); short of images, they repeat."""
    chosen = [(w.images, torch.arange(count) % len(w.images)) for w in works]
    features = torch.stack([data.features[rows.to(data.labels.device)] for data, rows in chosen])
    labels = torch.stack([data.labels[rows.to(data.labels.device)] for data, rows in chosen])
    return features, labels


class _Batches:
    """The batches of clients in step, each client's images in an order of its own."""

    def __init__(self, method: Method[Any, Any], works: Sequence[Work[Any]]) -> None:
        self.sizes = [len(work.images) for work in works]
        # Room is made for whole batches
        self.batch_size = min(method.settings.batch_size, max(1, *self.sizes))
        self.features = torch.cat([work.images.features for work in works])
        self.labels = torch.cat([work.images.labels for work in works])
        self.generators = [method.generator("batches", w.client_id, w.round) for w in works]

    def epoch(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield a step's features (A, b, ...), labels (A, b), sizes (A,) for A clients at work.

        Where a client has fewer than b images left, the other rows have the label IGNORED. Orders
        are drawn and moved to the device once an epoch, so that no step waits for it.
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
def accuracies(
    head: Head, splits: Mapping[str, Split], blank: Tensor | None = None
) -> dict[str, float]:
    """Return, by split, the share of images whose largest logit is their label.

    Prompts are encoded once for all splits; a split without images has no accuracy.

    blank: what is read of an image without content, by which logits are calibrated.
    """
    logits = classifier(head, blank)
    return {
        name: _share_right(logits(data.features), data.labels)
        for name, data in splits.items()
        if len(data)
    }


@torch.no_grad()
def classifier(head: Head, blank: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """Return what gives logits (n, C) of what is read of images (n, ...), as they are measured.

    Prompts are encoded once, here. blank: as `accuracies` takes it.
    """
    head.eval()
    encoded = head.encode()
    prior = None if blank is None else head.predict(blank[None], encoded)

    @torch.no_grad()
    def logits(features: Tensor) -> Tensor:
        found = head.predict(features, encoded)
        return found if prior is None else calibrated(found, prior)

    return logits


def blank_for(method: Method[Any, Any]) -> Tensor | None:
    """Return what a method reads of an image without content; None where nothing is calibrated."""
    if not method.settings.prompt.calibrate:
        return None
    return read_blank(method.clip, type(method).reads(method.own).kind)


def calibrated(logits: Tensor, prior: Tensor) -> Tensor:
    """Return log p(c | x) - log p(c | x0), up to a constant of each image, of logits (n, C).

    prior: logits (1, C) of an input without content, x0. A class that the prompt prefers whatever
    it is shown loses that preference (contextual calibration: Zhao et al., ICML 2021, arXiv
    2102.09690; OpenPrompt's `calibrate`, arXiv 2111.01998).
    """
    return logits.log_softmax(dim=-1) - prior.log_softmax(dim=-1)


@torch.no_grad()
def zeroshot_accuracies(
    clip: FrozenClip, task: Task, splits: Mapping[str, Split]
) -> dict[str, float]:
    """Return, by split, the accuracy of CLIP with the task's sentence; features are (n, d)."""
    # Not normalised: the length of an image's feature does not change which class is the nearest
    text_features = clip.zeroshot(task.classnames, task.template)
    return {
        name: _share_right(data.features @ text_features.t(), data.labels)
        for name, data in splits.items()
        if len(data)
    }


def _share_right(logits: Tensor, labels: Tensor) -> float:
    if logits.isnan().any():
        # Their largest would count as class 0
        raise ValueError("logits are not finite; lower the learning rate")
    return int((logits.argmax(dim=1) == labels).sum()) / len(labels)
