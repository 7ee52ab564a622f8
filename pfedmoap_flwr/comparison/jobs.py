"""Cells that run: one after the other in this process, or several at once on Ray."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from pfedmoap_flwr import api, config, methods
from pfedmoap_flwr.comparison.cells import Cell
from pfedmoap_flwr.engines.tasks import side_by_side
from pfedmoap_flwr.errors import reason_of
from pfedmoap_flwr.methods import outside
from pfedmoap_flwr.settings import Value

Tell = Callable[[Cell, str], None]
"""Called when a cell has ended, with the reason if it failed, or ""."""
Worker = Callable[[Sequence[Cell], Tell], None]
"""Runs cells, and tells of each."""


def run_here(cells: Sequence[Cell], tell: Tell) -> None:
    """Run cells in this process; one that fails is told, and the next one begins."""
    for cell in cells:
        try:
            api.execute(cell.plan())
            reason = ""
        except Exception as error:  # a mistake in one method must not end the others' runs
            reason = reason_of(error)
        tell(cell, reason)


def run_on_ray(cells: Sequence[Cell], tell: Tell, jobs: int, address: str) -> None:
    """Run cells as Ray's tasks, so many at once; those of a cluster see this machine's folders.

    Raises UsageError where Ray cannot be reached.
    """
    files = tuple(map(str, outside.files().values()))
    work = {
        number: (_one_core(cell).plan().settings.flat(), files) for number, cell in enumerate(cells)
    }
    for number, reason in side_by_side(_run_cell, work, jobs, address):
        tell(cells[number], reason)


def _one_core(cell: Cell) -> Cell:
    """Return the cell with a client at a time: the other cores have cells of their own."""
    return replace(cell, values={**cell.values, "clients-at-once": 1})


def _run_cell(work: tuple[Mapping[str, Value], tuple[str, ...]]) -> str:
    """Run a cell in a process of Ray's; return why it failed, or "".

    work: its settings, and the methods' files that this command named.
    """
    torch.set_num_threads(1)
    flat, files = work
    try:
        # A cluster's processes have another environment than this command's
        for file in files:
            methods.named(file)
        settings = config.parse(flat)
        api.execute(api.Plan(settings, Path(settings.run_dir)))
    except Exception as error:
        return reason_of(error)
    return ""


class Clock:
    """How long is left, by how long the cells so far took."""

    def __init__(self, cells: int) -> None:
        self.left, self.done = cells, 0
        self.started = time.monotonic()

    def tick(self) -> str:
        """Count an ended cell; return the time left in words, "" after the last one."""
        self.left, self.done = self.left - 1, self.done + 1
        seconds = (time.monotonic() - self.started) / self.done * self.left
        if not self.left:
            return ""
        return (
            f"about {seconds / 60:.0f} min left" if seconds > 90 else f"about {seconds:.0f} s left"
        )
