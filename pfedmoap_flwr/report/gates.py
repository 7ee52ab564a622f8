"""What the gates of a pFedMoAP run do: whom a client's images listen to (the paper's Figure 6)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.pfedmoap import PFedMoAPHead
from pfedmoap_flwr.runs.find_model import RunModels
from pfedmoap_flwr.runs.insight import owner_names
from pfedmoap_flwr.runs.model import Model


@dataclass(frozen=True)
class GateView:
    """One client's gate on its own test images.

    owners: whose each expert is (K+1,), the client's own first.
    by_class: attention by expert and class (K+1, C), mean over images and heads. shares: of it by
    expert (K+1,), mean over classes.
    entropy: of the attention, mean over the same, divided by log(K+1): 1 is a flat gate.
    cosine: of local and borrowed text features of the same class, mean over classes and experts.
    """

    client_id: int
    owners: tuple[str, ...]
    by_class: tuple[tuple[float, ...], ...]
    shares: tuple[float, ...]
    entropy: float
    cosine: float


def has_gates(models: RunModels) -> bool:
    """Tell whether the heads of a run have gates to look at."""
    head = models.method.build()
    return isinstance(head, PFedMoAPHead) and head.gate is not None


def gates_of(models: RunModels, client_ids: Sequence[int] = ()) -> list[GateView]:
    """Return what the kept gates of a run's clients do; without `client_ids`, of all of them.

    Raises UsageError where the run has no gate, or none has borrowed an expert yet.
    """
    if not has_gates(models):
        raise UsageError(
            f"{models.folder}: {models.settings.method} has no gate to look at in this run"
        )
    wanted = client_ids or models.clients
    views = [_view(models.of(i), models.split(i)("test").features) for i in wanted]
    found = [view for view in views if view]
    if not found:
        raise UsageError(f"{models.folder}: no client there has borrowed experts")
    return found


@torch.no_grad()
def _view(model: Model, images: torch.Tensor) -> GateView | None:
    head = model.head
    if not isinstance(head, PFedMoAPHead) or head.gate is None or head.experts is None:
        return None
    if not len(head.experts) or not len(images):
        return None
    local = head.encode()
    # Of each head apart: the mean of heads that look elsewhere is flatter than any of them
    weights = head.gate.attention(head.reduce(F.normalize(images, dim=-1)), head.all_experts(local))
    entropy = -(weights * weights.clamp_min(1e-12).log()).sum(dim=2).mean()
    by_class = weights.mean(dim=(0, 1)).expand(-1, len(model.classnames))
    return GateView(
        client_id=model.meaning.client,
        owners=tuple(owner_names(model, len(by_class))),
        by_class=tuple(tuple(row) for row in by_class.tolist()),
        shares=tuple(by_class.mean(dim=1).tolist()),
        entropy=entropy.item() / math.log(len(by_class)),
        cosine=(head.encoder(head.experts) * local).sum(-1).mean().item(),
    )
