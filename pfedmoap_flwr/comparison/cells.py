"""The cells of a comparison: methods times swept settings times seeds, a run folder each.

The folder of a comparison is its own state: which cells are done, half done or to be done is read
from their folders, whoever ran them and however they ended.
"""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pfedmoap_flwr import api, config, files, methods
from pfedmoap_flwr.api import Plan, RunResult
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.runs import checkpoint
from pfedmoap_flwr.runs.folder import RunFolder, check_same, load_settings
from pfedmoap_flwr.runs.place import folder_named, make_folder, stamp, unused
from pfedmoap_flwr.settings import Value

State = Literal["done", "begun", "new"]
Sweeps = Mapping[str, Sequence[Value]]
"""The values of each setting that is swept."""
Own = Mapping[str, Mapping[str, Value]]
"""Values of single methods, over those of all."""


@dataclass(frozen=True)
class Cell:
    """One run. label: its method and what is swept, the same for all seeds."""

    label: str
    seed: int
    values: Mapping[str, Value]
    folder: Path

    @property
    def name(self) -> str:
        """What it is called in a list."""
        return f"{self.label}, seed {self.seed}"

    def state(self) -> State:
        """Return how far the run in the folder is.

        A finished one is done without its checkpoint too, as in an archive of results. One that has
        neither has nothing to keep.
        """
        asked = config.parse(dict(self.values)).num_server_rounds
        ended = (self.folder / "summary.json").exists() and not (self.folder / "error.txt").exists()
        if ended and RunFolder(self.folder).summary()["rounds"] >= asked:
            return "done"
        return "begun" if checkpoint.is_there(self.folder) else "new"

    def plan(self) -> Plan:
        """Return what is left to run. Raises UsageError where the folder has another run's."""
        if self.state() == "begun":
            return api.plan({**self.values, "resume": str(self.folder)})
        if not any(self.folder.rglob("*.safetensors")):
            # A run that ended before its first checkpoint; whatever else lies there is not ours
            RunFolder(self.folder).forget_beginning()
        return api.plan({**self.values, "run-dir": str(self.folder)})

    def check(self) -> None:
        """Raise UsageError where what is asked cannot run, or is not what its folder holds."""
        if self.state() == "done":
            check_same(load_settings(self.folder), config.parse(dict(self.values)))
        else:
            self.plan()

    def result(self) -> RunResult:
        """Return what the finished run left."""
        return RunResult.read(self.folder)


def grid(
    chosen: Sequence[str],
    seeds: Sequence[int],
    values: Mapping[str, Value],
    sweeps: Sweeps,
    root: Path,
    own: Own | None = None,
) -> list[Cell]:
    """Return the cells in the order in which they run: seed by seed, so that all begin to show.

    A setting of one method is swept for that method alone. Raises UsageError for a name twice.
    """
    for key in ("run-dir", "resume"):
        if values.get(key):
            raise UsageError(f"setting {key}: is for one run; a comparison has its own folder")
    cells = [
        _cell(method, seed, {**values, **(own or {}).get(method, {}), **swept}, swept, root)
        for seed in seeds
        for method in chosen
        for swept in _combinations(method, sweeps)
    ]
    folders = [cell.folder for cell in cells]
    if twice := {folder.name for folder in folders if folders.count(folder) > 1}:
        raise UsageError(f"a comparison has the run {min(twice)} more than once")
    return cells


def checked(
    chosen: Sequence[str],
    seeds: Sequence[int],
    values: Mapping[str, Value],
    sweeps: Sweeps,
    out: str,
    own: Own | None = None,
) -> tuple[Path, list[Cell]]:
    """Return the comparison's folder, made when all cells are right, and its cells.

    Raises UsageError for the first that cannot run, or is not what its folder holds.
    """
    place = folder_named("--out", out) if out else unused(f"{stamp()}-compare")
    for cell in grid(chosen, seeds, values, sweeps, place, own):
        cell.check()
    root = new_root(out)
    return root, grid(chosen, seeds, values, sweeps, root, own)


def new_root(out: str, kind: str = "compare") -> Path:
    """Return the folder of many runs: the one named, or a new one in runs/ by the time."""
    if out:
        root = folder_named("--out", out)
        make_folder("--out", root)
        return root
    while True:
        root = unused(f"{stamp()}-{kind}")
        try:
            make_folder("run-dir", root.parent)
            root.mkdir()
            return root
        except FileExistsError:  # another comparison began in this second
            continue


def _combinations(method: str, sweeps: Sweeps) -> list[dict[str, Value]]:
    """Return all combinations of the swept values that a method has."""
    own = {key: values for key, values in sweeps.items() if belongs(key, method)}
    return [dict(zip(own, each, strict=True)) for each in itertools.product(*own.values())]


def belongs(key: str, method: str) -> bool:
    """Tell whether a setting is one of every method's or of this one's."""
    first = key.partition(".")[0]
    return first == method or first not in methods.names()


def _cell(
    method: str, seed: int, values: Mapping[str, Value], swept: Mapping[str, Value], root: Path
) -> Cell:
    label = " ".join([method, *(f"{key}={value}" for key, value in swept.items())])
    parts = [method, *(f"{key}={value}" for key, value in swept.items()), f"s{seed}"]
    name = re.sub(r"[^A-Za-z0-9=._-]", "_", "-".join(parts))
    return Cell(label, seed, {**values, "method": method, "seed": seed}, root / name)


def results(cells: Sequence[Cell]) -> dict[str, list[RunResult]]:
    """Return the results of the cells that are done, by label, in the order of seeds."""
    found: dict[str, list[RunResult]] = {}
    for cell in sorted(cells, key=lambda cell: cell.seed):
        if cell.state() == "done":
            found.setdefault(cell.label, []).append(cell.result())
    # As they were asked for, not as seeds happen to be done
    return {
        label: found[label] for label in dict.fromkeys(c.label for c in cells) if label in found
    }


def write_down(found: Mapping[str, Sequence[RunResult]], root: Path) -> None:
    """Write comparison.json: the summaries by label."""
    summaries = {label: [result.summary for result in runs] for label, runs in found.items()}
    files.replace(root / "comparison.json", json.dumps(summaries, indent=2))
