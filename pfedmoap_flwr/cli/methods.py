"""pfedmoap methods: every method with what travels, what stays, and where it comes from."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pfedmoap_flwr import config, methods
from pfedmoap_flwr.clip.load import load_clip
from pfedmoap_flwr.data.federated import federated
from pfedmoap_flwr.methods.base import Upload
from pfedmoap_flwr.settings import Value


@dataclass(frozen=True)
class Row:
    """What a method sends to a client after its first round, gets back, and leaves there.

    kept: how many numbers the parameters have that never leave a client; stays: their names.
    """

    name: str
    down: int
    up: int
    kept: int
    stays: str
    reading: str
    fidelity: str
    source: str


def print_methods(values: Mapping[str, Value], console: Console) -> None:
    """Print a row per method, with floats of a prompt as these settings have it."""
    rows = [describe(name, values) for name in methods.names()]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True)
    for column in ("down", "up"):
        table.add_column(column, justify="right")
    for column in ("stays", "reads", "fidelity", "source"):
        table.add_column(column, overflow="fold")
    for row in rows:
        numbers = f"{row.down:,}", f"{row.up:,}"
        table.add_row(row.name, *numbers, row.stays, row.reading, row.fidelity, row.source)
    console.print(table)
    console.print("down, up: numbers that travel for a client in a round after its first one")


def describe(name: str, values: Mapping[str, Value]) -> Row:
    """Return a method's row. Nothing is trained: uploads are examples of what would come."""
    settings = config.parse({**values, "method": name})
    held = federated(settings.data, settings.seed)
    kind = methods.load(name)
    clip = load_clip(settings.clip, settings.device)
    method = methods.make(name, settings, settings.own, clip, held.task)
    clients, state = sorted(held.clients), method.start()
    sent = method.send(state, clients, train=True)
    uploads = {i: Upload(method.expected(state, sent[i]), 1) for i in clients}
    method.merge(state, uploads)
    first = clients[0]
    received = method.send(state, clients, train=True)[first]
    head = method.build()
    personal = {n: p for n, p in head.named_parameters() if method.is_personal(n)}
    return Row(
        name=name,
        down=_numbers(received),
        up=_numbers(method.expected(state, received)),
        kept=_numbers(personal),
        stays=", ".join(dict.fromkeys(name.partition(".")[0] for name in personal)) or "-",
        reading=kind.reads(settings.own).kind,
        fidelity=method.fidelity,
        source=(sys.modules[kind.__module__].__doc__ or "").split(":")[0],
    )


def _numbers(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())
