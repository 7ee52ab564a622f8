"""Many runs that differ in what is compared and in nothing else."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pfedmoap_flwr.api import RunResult, to_flat
from pfedmoap_flwr.comparison import jobs
from pfedmoap_flwr.comparison.cells import Cell, checked, results, write_down
from pfedmoap_flwr.errors import RunFailed
from pfedmoap_flwr.methods import RIVALS, named
from pfedmoap_flwr.settings import Value, key_of


def compare(
    methods: Sequence[str] = RIVALS,
    seeds: Sequence[int] = (0, 1, 2),
    *,
    sweep: Mapping[str, Sequence[Value]] | None = None,
    out: str | os.PathLike[str] = "",
    conf: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> dict[str, list[RunResult]]:
    """Run methods over seeds, all else equal; return each one's results in the order of seeds.

    methods: names, or Python files.
    sweep: the values of settings to compare, {"lr": [0.001, 0.002]}; then the keys of what is
        returned are "promptfl lr=0.001". out: the folder; what is done there is not run again.

    All are checked before the first one starts. Settings and errors are those of `run`; a run that
    fails does not stop the others, and RunFailed names it in the end.

    >>> import pfedmoap_flwr as pf
    >>> results = pf.compare(["coop", "zeroshot"], [0], num_server_rounds=1, local_epochs=1)
    >>> {name: [result.summary["bytes_up"] for result in runs] for name, runs in results.items()}
    {'coop': [0], 'zeroshot': [0]}
    """
    sweeps = {".".join(map(key_of, k.split("."))): v for k, v in (sweep or {}).items()}
    chosen = list(map(named, methods))  # first of all: a file brings settings of its own
    root, cells = checked(chosen, seeds, to_flat(settings, conf), sweeps, os.fspath(out))
    if failed := run_cells(cells, root):
        raise RunFailed(said(failed))
    return results(cells)


def run_cells(
    cells: Sequence[Cell],
    root: Path,
    tell: jobs.Tell | None = None,
    work: jobs.Worker = jobs.run_here,
) -> dict[str, str]:
    """Run the cells that are not done, one by one or as `work` does; write comparison.json.

    tell: called besides for each that has ended. Returns why cells failed, by their names.
    """
    failed: dict[str, str] = {}

    def end(cell: Cell, reason: str) -> None:
        if reason:
            failed[cell.name] = reason
        if tell:
            tell(cell, reason)

    left = [cell for cell in cells if cell.state() != "done"]
    work(left, end)
    write_down(results(cells), root)
    return failed


def said(failed: Mapping[str, str]) -> str:
    """Return a line for each cell that failed."""
    return "\n".join(f"{name} failed: {why}" for name, why in failed.items())
