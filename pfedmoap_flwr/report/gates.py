"""What the gates of a pFedMoAP run do: whom a client's images listen to (the paper's Figure 6)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from pfedmoap_flwr import methods
from pfedmoap_flwr.clip.features import Reading
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.pfedmoap import PFedMoAP
from pfedmoap_flwr.runs.folder import RunFolder, load_settings
from pfedmoap_flwr.runs.heads import KeptHeads
from pfedmoap_flwr.training.exchange import make_work
from pfedmoap_flwr.training.node import Node, node_of


@dataclass(frozen=True)
class GateView:
    """One client's gate on its own test images.

    shares: of attention by expert (K+1,), the client's own first; mean over images, heads, classes.
    entropy: of the attention, mean over the same, divided by log(K+1): 1 is a flat gate.
    cosine: of local and borrowed text features of the same class, mean over classes and experts.
    """

    client_id: int
    shares: tuple[float, ...]
    entropy: float
    cosine: float


def inspect_gates(folder: Path, client_ids: Sequence[int] = ()) -> list[GateView]:
    """Return what the kept gates of a run's clients do; without `client_ids`, of all of them.

    Raises UsageError where the run has no gate, or none has borrowed an expert yet.
    """
    settings = load_settings(folder)
    kind = methods.load(settings.method)
    if kind is not PFedMoAP or settings.own.gate == "none":
        raise UsageError(f"{folder}: {settings.method} has no gate to look at in this run")
    node = node_of(settings.clip, settings.data, settings.seed, settings.device, Reading())
    method = kind(settings, settings.own, node.clip, node.federated.task)
    heads = Path(settings.state_dir) / RunFolder(folder).run_id
    wanted = client_ids or sorted(node.federated.clients)
    views = [_view(method, node, heads / f"client-{i}", i) for i in wanted]
    found = [view for view in views if view]
    if not found:
        raise UsageError(f"{folder}: no client there has borrowed experts; heads are in {heads}")
    return found


@torch.no_grad()
def _view(method: PFedMoAP, node: Node, folder: Path, client_id: int) -> GateView | None:
    kept = KeptHeads(folder).load(before=method.settings.num_server_rounds + 1)
    if kept is None or not len(kept.get("experts", ())):
        return None
    work = make_work(method, client_id, 0, lambda name: node.split(client_id, name), {}, kept)
    head, images = work.head, node.split(client_id, "test").features
    if head.gate is None or not len(images):
        return None
    local = head.encode()
    attention = head.gate.attention(
        head.reduce(F.normalize(images, dim=-1)), head.all_experts(local)
    )
    entropy = -(attention * attention.clamp_min(1e-12).log()).sum(dim=2).mean()
    borrowed = head.encoder(head.experts)
    return GateView(
        client_id=client_id,
        shares=tuple(attention.mean(dim=(0, 1, 3)).tolist()),
        entropy=entropy.item() / math.log(attention.shape[2]),
        cosine=(borrowed * local).sum(-1).mean().item(),
    )
