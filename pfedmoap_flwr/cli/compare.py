"""pfedmoap compare: several methods over several seeds, all else equal."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from pfedmoap_flwr.cli.bar import bar
from pfedmoap_flwr.cli.say import say
from pfedmoap_flwr.comparison import jobs, run_cells, said, slurm
from pfedmoap_flwr.comparison.cells import Cell, Own, Sweeps, checked, grid
from pfedmoap_flwr.errors import RunFailed, UsageError
from pfedmoap_flwr.report import tables
from pfedmoap_flwr.runs.place import folder_named
from pfedmoap_flwr.settings import Value


@dataclass(frozen=True)
class How:
    """How a comparison is run.

    out: its folder; "": a new one. at_once, address: of Ray, see `jobs`. slurm: options of sbatch.
    tuned: values of each method, over those of all.
    """

    out: str = ""
    at_once: int = 1
    address: str = ""
    dry: bool = False
    slurm: Mapping[str, str] = field(default_factory=dict)
    tuned: Own = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise UsageError where runs are to go two ways at once."""
        if self.slurm and (self.at_once > 1 or self.address):
            raise UsageError("--slurm and Ray's --jobs or --ray-address: one of them")


def compare_all(
    methods: Sequence[str],
    seeds: Sequence[int],
    sweeps: Sweeps,
    values: Mapping[str, Value],
    how: How,
    console: Console,
) -> None:
    """Run what is not done yet; print the report, what failed, and where the results are.

    Raises RunFailed where a run failed, after all others.
    """
    if how.dry:
        cells = grid(
            methods, seeds, values, sweeps, folder_named("--out", how.out or "runs"), how.tuned
        )
        from pfedmoap_flwr.cli.estimate import print_estimates

        print_estimates(cells, how.at_once, console)
        return
    root, cells = checked(methods, seeds, values, sweeps, how.out, how.tuned)
    failed = _run(cells, root, how, console)
    # Where every run failed there is nothing to report on
    if len(failed) < len(cells):
        from pfedmoap_flwr.cli.report import report_comparison

        report_comparison(root, console)
    say(console, f"results in {root}")
    if failed:
        again = "the same command with --out" if how.out else f"--out {root}"
        raise RunFailed(
            f"{said(failed)}\n{len(failed)} of {len(cells)} runs failed; {again} tries them again"
        )


def _run(cells: Sequence[Cell], root: Path, how: How, console: Console) -> dict[str, str]:
    left = [cell for cell in cells if cell.state() != "done"]
    if len(left) < len(cells):
        say(console, f"{len(cells) - len(left)} of {len(cells)} runs are done already")
    clock = jobs.Clock(len(left))

    def tell(cell: Cell, reason: str) -> None:
        end = f"failed: {reason}" if reason else tables.outcome(cell.result().summary)
        words = [f"[{clock.done + 1}/{len(left)}] {cell.name}", end, clock.tick()]
        say(console, "  ".join(word for word in words if word))
        move(clock.done)

    with bar("run", len(left)) as move:
        return run_cells(cells, root, tell, _worker(how, root))


def _worker(how: How, root: Path) -> jobs.Worker:
    """Return what runs cells: SLURM, Ray, or this process."""
    if how.slurm:
        return functools.partial(slurm.run_on_slurm, options=how.slurm, root=root)
    if how.at_once > 1 or how.address:
        return functools.partial(jobs.run_on_ray, jobs=how.at_once, address=how.address)
    return jobs.run_here
