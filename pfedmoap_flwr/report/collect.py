"""Run folders as they lie on disk, whoever made them: done, half done, failed or damaged."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pfedmoap_flwr.config import Settings
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.runs.folder import PLACES, RunFolder, load_settings
from pfedmoap_flwr.runs.record import Round
from pfedmoap_flwr.settings import Value

SAME_NUMBERS = {*PLACES, "data.strict"}
NO_DIFFERENCE = {*SAME_NUMBERS, "method", "seed", "data.name"}
LARGEST = 3  # classes of a client that are named


@dataclass(frozen=True)
class Run:
    """One run. state: "done", or how far it is and why it stands still.

    partition: the digest of who holds what, "" where it is not known. classes: of a client's
    training images, the largest in words. domains, classes: by client.
    """

    folder: Path
    settings: Settings
    rounds: Sequence[Round]
    state: str
    partition: str = ""
    domains: Mapping[int, str] = field(default_factory=dict)
    classes: Mapping[int, str] = field(default_factory=dict)

    @property
    def is_done(self) -> bool:
        """Whether all its rounds are there."""
        return self.state == "done"

    @cached_property
    def flat(self) -> dict[str, Value]:
        """All its settings by key."""
        return self.settings.flat()

    @cached_property
    def environment(self) -> dict[str, Any]:
        """What it was made with; empty where nobody wrote it down."""
        return _read(self.folder / "environment.json")


@dataclass(frozen=True)
class Collection:
    """Runs in the order of their folders. left_out: why a folder's run is in no table."""

    runs: Sequence[Run]
    left_out: Mapping[Path, str]

    @property
    def done(self) -> list[Run]:
        """The runs that count."""
        return [run for run in self.runs if run.is_done]

    @cached_property
    def labels(self) -> dict[Path, str]:
        """Each run's method, and the settings in which it differs from others of its method."""
        found = {}
        for run in self.runs:
            rivals = [
                other.flat for other in self.runs if other.flat["method"] == run.flat["method"]
            ]
            keys = [key for key in _differing(rivals) if not key.startswith("data.")]
            found[run.folder] = _named(str(run.flat["method"]), run, keys)
        return found

    @cached_property
    def datasets(self) -> dict[Path, str]:
        """Each run's data set, and the settings by which others divide the same one otherwise."""
        found = {}
        for run in self.runs:
            name = run.settings.data.name
            others = [other.flat for other in self.runs if other.settings.data.name == name]
            keys = [key for key in _differing(others) if key.startswith("data.")]
            found[run.folder] = _named(name, run, keys)
        return found


def collect(folders: Sequence[Path]) -> Collection:
    """Read all runs in or below folders. Of two that are alike the first one counts.

    Raises UsageError where a folder is not there, or no run is below any.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"report {folder}: there is no such folder")
    named = [
        path.parent
        for folder in folders
        for path in sorted(folder.resolve().rglob("settings.json"))
    ]
    if not named:
        where = ", ".join(map(str, folders))
        raise UsageError(f"report {where}: no settings.json there or below; give folders of runs")
    runs: list[Run] = []
    left_out: dict[Path, str] = {}
    alike: dict[str, Path] = {}
    for folder in dict.fromkeys(named):
        try:
            run = read(folder)
        except UsageError as error:
            left_out[folder] = str(error)
            continue
        what = json.dumps({k: v for k, v in run.flat.items() if k not in SAME_NUMBERS})
        if run.is_done and what in alike:
            left_out[folder] = f"has the settings and the seed of {alike[what].name}"
            continue
        if run.is_done:
            alike[what] = folder
        runs.append(run)
    if not runs:
        raise UsageError("report: no run can be read: " + "; ".join(left_out.values()))
    return Collection(runs, left_out)


def read(folder: Path) -> Run:
    """Read a run's folder. Raises UsageError where it is damaged."""
    settings = load_settings(folder)
    rounds = RunFolder(folder).rounds()
    said = _read(folder / "partition.json")
    clients = {card["client"]: card for card in said.get("clients", [])}
    names = said.get("classnames", [])
    return Run(
        folder,
        settings,
        rounds,
        _state(folder, settings, rounds),
        str(said.get("sha256", "")),
        {number: str(card.get("domain", "")) for number, card in clients.items()},
        {number: _largest(card, names) for number, card in clients.items()},
    )


def _state(folder: Path, settings: Settings, rounds: Sequence[Round]) -> str:
    done, asked = (rounds[-1].round if rounds else 0), settings.num_server_rounds
    if reason := RunFolder(folder).failure():
        return f"failed after round {done} of {asked}: {reason}"
    if (folder / "summary.json").exists() and done >= asked and any(r.clients for r in rounds):
        return "done"
    return f"half done: round {done} of {asked}"


def _read(path: Path) -> dict[str, Any]:
    """Return a JSON object, empty where there is none: a report does without it."""
    try:
        said = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def _largest(card: Mapping[str, Any], names: Sequence[str]) -> str:
    counts = card.get("classes", {}).get("train", [])
    order = sorted(range(len(counts)), key=lambda number: -counts[number])
    held = [names[number] for number in order if counts[number]]
    more = f" and {len(held) - LARGEST} more" if len(held) > LARGEST else ""
    return ", ".join(held[:LARGEST]) + more


def _differing(flats: Sequence[Mapping[str, Value]]) -> list[str]:
    keys = [key for key in flats[0] if key not in NO_DIFFERENCE]
    return [key for key in keys if len({flat.get(key) for flat in flats}) > 1]


def _named(name: str, run: Run, keys: Sequence[str]) -> str:
    return " ".join([name, *(f"{key}={run.flat[key]}" for key in keys if key in run.flat)])
