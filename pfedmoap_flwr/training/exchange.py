"""The two ends of a client's round: its work, and the check of what it uploads."""

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
