"""What a comparison would cost, measured on one training step of each kind of cell."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from pfedmoap_flwr import methods
from pfedmoap_flwr.cli.doctor import rehearsal
from pfedmoap_flwr.clip.features import read_shape
from pfedmoap_flwr.clip.load import load_clip
from pfedmoap_flwr.comparison.cells import Cell
from pfedmoap_flwr.config import Settings, parse
from pfedmoap_flwr.data.federated import federated
from pfedmoap_flwr.methods.base import Split, Work
from pfedmoap_flwr.report.tables import megabytes
from pfedmoap_flwr.training import local
from pfedmoap_flwr.training.capacity import bytes_of_step
from pfedmoap_flwr.training.rehearsal import made_up, one_epoch

REPEATS = 3
"""Of them the fastest counts: other work on the machine can only slow a step down."""


@dataclass(frozen=True)
class Estimate:
    """seconds: of training on one core. saved: bytes that a step keeps for its backward pass."""

    seconds: float
    saved: int


def estimate(settings: Settings) -> Estimate:
    """Return what training of a run costs, from one step on made-up images of a full batch.

    Reading images and evaluation come on top. Raises UsageError where such a run cannot start.
    """
    held, clip = federated(settings.data, settings.seed), load_clip(settings.clip, settings.device)
    method, work = rehearsal(settings, clip, held)
    trains = settings.data.trains
    sizes = [len(client.rows["train"]) for i, client in held.clients.items() if trains(i)]
    batch = min(settings.batch_size, max(sizes))
    reading = methods.load(settings.method).reads(settings.own)
    images = made_up(method, batch, read_shape(clip, reading.of("train")))

    def of_batch(name: str) -> Split:
        return images

    one = Work(work.client_id, work.round, work.head, of_batch, work.received)
    saved = bytes_of_step(method, one, batch)  # before any training
    phases = one_epoch(method, one.head)
    local.train(method, [one], phases)  # the first step also makes what later ones share
    seconds = min(_seconds(lambda: local.train(method, [one], phases)) for _ in range(REPEATS))
    step = seconds / max(1, sum(epochs for epochs, _ in phases))
    epochs = sum(n for n, _ in method.schedule(one.head, settings.local_epochs))
    steps = sum(math.ceil(size / batch) for size in sizes) * epochs
    rounds = settings.num_server_rounds * settings.fraction_train
    return Estimate(step * steps * rounds, saved)


def _seconds(work: Callable[[], object]) -> float:
    before = time.perf_counter()
    work()
    return time.perf_counter() - before


def print_estimates(cells: Sequence[Cell], jobs: int, console: Console) -> None:
    """Print all cells, what is to be done of them, and what each kind costs."""
    by_label: dict[str, list[Cell]] = {}
    for cell in cells:
        by_label.setdefault(cell.label, []).append(cell)
    table = Table(title=f"{len(cells)} runs, nothing is run")
    for name in ("runs of", "seeds", "done", "half done", "time a run", "memory of a step"):
        table.add_column(name, justify="left" if name == "runs of" else "right")
    total = 0.0
    for label, same in by_label.items():
        states = [cell.state() for cell in same]
        cost = estimate(parse(dict(same[0].values)))
        total += cost.seconds * (len(same) - states.count("done"))
        seeds = ",".join(str(cell.seed) for cell in same)
        counts = (str(states.count("done")), str(states.count("begun")))
        table.add_row(label, seeds, *counts, duration(cost.seconds), megabytes(cost.saved))
    console.print(table)
    console.print(
        f"training of what is left: about {duration(total / jobs)} with {jobs} at once, from one "
        f"step of each on {torch.get_num_threads()} threads; evaluation comes on top"
    )


def duration(seconds: float) -> str:
    """Return seconds as "45 s", "12 min" or "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
