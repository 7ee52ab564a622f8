"""The two ends of a client's round: its work, and the checks of what it uploads and keeps."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pfedmoap_flwr.methods.base import Head, Method, Split, Work


def make_work(
    method: Method[Any, Any],
    client_id: int,
    server_round: int,
    split: Callable[[str], Split],
    received: Mapping[str, Tensor],
    *states: Mapping[str, Tensor],
) -> Work[Any]:
    """Return the work of a client: its head is a fresh one, overwritten by the states in turn."""
    head: Head = method.build()
    for state in states:
        head.load(state)
    on_device = {name: tensor.to(head.device) for name, tensor in received.items()}
    work = Work(client_id, server_round, head, split, on_device)
    method.prepare(work)
    return work


def personal_work(
    method: Method[Any, Any],
    client_id: int,
    server_round: int,
    split: Callable[[str], Split],
    received: Mapping[str, Tensor],
    kept: Mapping[str, Tensor] | None,
) -> Work[Any]:
    """Return the work whose head is a client's personal model: the kept head, adapted.

    A client that never trained adapts what it received.
    """
    state = received if kept is None else kept
    work = make_work(method, client_id, server_round, split, received, state)
    method.adapt(work)
    return work


def check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise ValueError where an upload is unfit to merge; `expected` has an example of each tensor.

    Names, shapes and dtypes must be those, and all numbers finite.
    """
    if tensors.keys() != expected.keys():
        raise ValueError(f"uploaded {sorted(tensors)}, not {sorted(expected)}")
    for name, tensor in tensors.items():
        like = expected[name]
        if tensor.shape != like.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {tuple(like.shape)}")
        if tensor.dtype != like.dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype}, not {like.dtype}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} is not finite; lower the learning rate")


def check_state(tensors: Mapping[str, Tensor], like: Head) -> None:
    """Raise ValueError where these are not the whole state of such a head, fit to go on from.

    Parameters have the same shapes and dtypes and are finite. A buffer may have any shape, be
    infinite (a bound that is not reached yet) or have been None in `like`; it is never NaN.
    """
    parameters, state = dict(like.named_parameters()), like.state_dict()
    unset = {
        f"{path}.{name}" if path else name
        for path, module in like.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is None and name not in module._non_persistent_buffers_set
    }
    if not state.keys() <= tensors.keys() <= state.keys() | unset:
        raise ValueError(f"holds {sorted(tensors)}, not {sorted(state)}")
    for name, tensor in tensors.items():
        if name not in parameters:
            if tensor.is_floating_point() and tensor.isnan().any():
                raise ValueError(f"{name} is not a number")
            continue
        own = parameters[name]
        if (tensor.shape, tensor.dtype) != (own.shape, own.dtype):
            came, wanted = (f"{t.dtype} {tuple(t.shape)}" for t in (tensor, own))
            raise ValueError(f"{name} is {came}, not {wanted}")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} is not finite")
