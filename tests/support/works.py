"""What lies before clients that differ in everything."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from pfedmoap_flwr.methods.base import Method, Split, Work
from pfedmoap_flwr.training import local
from support.federation import make_work

SIZES = (20, 9, 24, 8, 3)  # batches of 8: whole ones, a rest, less than one
SHAPES = {"features": (64,), "tokens": (5, 64), "pixels": (3, 16, 16)}


def made_works(method: Method[Any, Any], sizes: Sequence[int] = SIZES) -> list[Work[Any]]:
    """Clients that differ in all that they learn, in their images and in what they received."""
    generator = torch.Generator().manual_seed(0)
    server = method.start()
    sent = method.send(server, range(len(sizes)), train=True)
    works = []
    for client_id, size in enumerate(sizes):
        head = method.build()
        learned = {
            name: parameter.detach() + 0.1 * torch.rand(parameter.shape, generator=generator)
            for name, parameter in head.named_parameters()
        }
        received = {name: learned.get(name, tensor) for name, tensor in sent[client_id].items()}
        if type(method).__name__ == "PFedMoAP" and client_id % 2:
            received["experts"] = torch.randn((2, 4, 32), generator=generator)
        head.load(learned)
        head.load(received)
        shape = SHAPES[method.reads(method.own).kind]
        features = F.normalize(torch.randn((size, *shape), generator=generator), dim=-1)
        labels = torch.randint(0, 4, (size,), generator=generator)
        images = Split(features, labels)
        works.append(make_work(method, head, images, received, client_id, server_round=4))
    return works


def assert_stacked_as_alone(method: Method[Any, Any], *, rtol: float, atol: float) -> None:
    """Clients that train in one stack end with the heads that each gets by itself."""
    alone, joint = made_works(method), made_works(method)
    for work in alone:
        local.train(method, [work])
    local.train(method, joint)
    for one, other in zip(alone, joint, strict=True):
        torch.testing.assert_close(other.head.state(), one.head.state(), rtol=rtol, atol=atol)
