"""What a method makes of uploads, found out by a merge without any training."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pfedmoap_flwr.methods.base import Method, ServerState, Upload
from pfedmoap_flwr.randomness import torch_generator


def takes_mean(method: Method[Any, Any]) -> bool:
    """Tell whether what a method shares is what its `combine` says, so that another rule counts."""
    asked: list[int] = []
    probe = copy.copy(method)

    def noted(state: ServerState, uploads: Mapping[int, Upload]) -> dict[str, Tensor]:
        asked.append(len(uploads))
        return dict(state.shared)

    probe.combine = noted  # type: ignore[method-assign]
    state = probe.start()
    sent = probe.send(state, [0, 1], train=True)
    probe.merge(state, {i: Upload(probe.expected(state, t), 1) for i, t in sent.items()})
    return bool(asked and state.shared)


def needs_only_mean(method: Method[Any, Any]) -> bool:
    """Tell whether a server that knew the uploads' plain mean alone would do the same.

    Two uploads are compared with two copies of their mean. A server that keeps single uploads, or
    looks at how far they are apart, ends elsewhere. All clients must be sent the same.
    """
    apart, together = _merged(method, 0.1), _merged(method, 0.0)
    return apart is not None and together is not None and _alike(apart, together)


def _merged(method: Method[Any, Any], apart: float) -> dict[str, Tensor] | None:
    """Return the server's state after the merge of two uploads; None where it sends them others."""
    state = method.start()
    sent = method.send(state, [0, 1], train=True)
    if any(not torch.equal(t, state.shared.get(n, t.new_empty(0))) for n, t in sent[0].items()):
        return None
    uploads = {0: Upload({}, 1), 1: Upload({}, 1)}
    for name, tensor in method.expected(state, sent[0]).items():
        step = apart * torch.randn(tensor.shape, generator=torch_generator(0, "probe", name))
        uploads[0].tensors[name] = tensor + step.to(tensor.dtype)
        uploads[1].tensors[name] = tensor - step.to(tensor.dtype)
    method.merge(state, uploads)
    pool = {f"{i}.{n}": t for i, entry in state.pool.items() for n, t in entry.items()}
    return {**state.shared, **state.extra, **pool}


def _alike(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.allclose(tensor, other[name], rtol=1e-4, atol=1e-4) for name, tensor in one.items()
    )
