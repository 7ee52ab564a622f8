"""The run folder: settings, environment, partition, rounds, clients, summary, checkpoint."""

import csv
import functools
import io
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from pfedmoap_flwr import files
from pfedmoap_flwr.config import Settings, parse
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.runs.environment import environment
from pfedmoap_flwr.runs.record import Round

# Where a run lies and how it is reached, not what it computes
PLACES = ("run-dir", "resume", "state-dir", "min-nodes", "node-timeout", "device")


class RunFolder:
    """One run on disk. A file is replaced whole; rounds.jsonl grows by whole lines."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, settings: Settings) -> "RunFolder":
        """Make the folder of a new run and write its settings and environment.

        Raises UsageError where it holds a run already.
        """
        folder = cls(Path(settings.run_dir) if settings.run_dir else default_path(settings))
        check_unused(folder.path)
        folder.path.mkdir(parents=True, exist_ok=True)
        folder._write("settings.json", settings.flat())
        folder._write("environment.json", {"run_id": uuid4().hex, **environment()})
        return folder

    @classmethod
    def reopen(cls, settings: Settings, completed: int) -> "RunFolder":
        """Open the folder of a run to continue; rounds after the checkpoint are dropped.

        Raises UsageError where a setting that decides the numbers differs from the first run's.
        """
        folder = cls(Path(settings.resume))
        check_same(load_settings(folder.path), settings)
        folder.forget_ending()
        kept = [r.to_json() + "\n" for r in folder.rounds() if r.round <= completed]
        files.replace(folder.path / "rounds.jsonl", "".join(kept))
        return folder

    @functools.cached_property
    def run_id(self) -> str:
        """A random id, 32 hex digits: two runs never have the same, whatever their names."""
        said = json.loads((self.path / "environment.json").read_text())
        return str(said["run_id"])

    def save_partition(self, manifest: Mapping[str, Any]) -> None:
        """Write partition.json: which client holds which images."""
        self._write("partition.json", manifest, indent=None)

    def save_data(self, origins: Sequence[Mapping[str, Any]]) -> None:
        """Write data.json: where which clients' images come from."""
        self._write("data.json", origins)

    def append_round(self, record: Round) -> None:
        """Add a line to rounds.jsonl."""
        files.append_line(self.path / "rounds.jsonl", record.to_json())

    def rounds(self) -> list[Round]:
        """Return all rounds that were written whole."""
        path = self.path / "rounds.jsonl"
        if not path.is_file():
            return []
        # A last line without its end was cut off while being written
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        return [Round.from_json(line) for line in lines]

    def clients(self) -> list[dict[str, Any]]:
        """Return the lines of clients.csv, numbers as numbers; None where a client has none."""
        with (self.path / "clients.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        return [{k: v if k == "domain" else _number(v) for k, v in row.items()} for row in rows]

    def summary(self) -> dict[str, Any]:
        """Return what summary.json holds."""
        said: dict[str, Any] = json.loads((self.path / "summary.json").read_text())
        return said

    def finish(self, settings: Settings, cards: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Write clients.csv and summary.json and return the summary."""
        rounds = self.rounds()
        rows = _client_rows(rounds, cards)
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        files.replace(self.path / "clients.csv", table.getvalue())
        summary = summarise(settings, rounds)
        self._write("summary.json", summary)
        return summary

    def forget_ending(self) -> None:
        """Remove what says how an earlier run in this folder ended."""
        for ending in ("summary.json", "error.txt"):
            (self.path / ending).unlink(missing_ok=True)

    def fail(self, reason: str) -> None:
        """Leave the reason why a run ended, for the command that started it."""
        files.replace(self.path / "error.txt", reason)

    def _write(self, name: str, said: Any, indent: int | None = 2) -> None:
        files.replace(self.path / name, json.dumps(said, indent=indent))


def default_path(settings: Settings) -> Path:
    """Return an unused runs/<time>-<method>-<dataset>-s<seed> of the current directory."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    name = f"{stamp}-{settings.method}-{settings.data.name}-s{settings.seed}"
    path = Path.cwd() / "runs" / name
    twin = 1
    while path.exists():
        twin += 1
        path = path.with_name(f"{name}-{twin}")
    return path


def load_settings(run_dir: Path) -> Settings:
    """Read the settings of an earlier run. Raises UsageError where there are none."""
    try:
        return parse(json.loads((run_dir / "settings.json").read_text()))
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"resume={run_dir}: no settings.json there; give a run's folder") from None


def check_unused(run_dir: Path) -> None:
    """Raise UsageError where a folder holds the rounds of a run: another's would be mixed in."""
    if (run_dir / "rounds.jsonl").exists():
        raise UsageError(
            f"setting run-dir={run_dir}: holds a run already; give another folder, or continue "
            f"that run with resume={run_dir}"
        )


def check_same(before: Settings, now: Settings) -> None:
    """Raise UsageError naming a setting by which a resumed run would differ from its start."""
    old, new = before.flat(), now.flat()
    for key in sorted(old.keys() - set(PLACES) - {"num-server-rounds"}):
        if old[key] != new.get(key):
            raise UsageError(
                f"setting {key}={new.get(key)!r}: the run to resume has {old[key]!r}; only "
                "num-server-rounds may change"
            )


def summarise(settings: Settings, rounds: Sequence[Round]) -> dict[str, Any]:
    """Return what summary.json holds: accuracies of the last evaluation, bytes of all rounds."""
    last = next(r for r in reversed(rounds) if r.clients)
    trained = [r for r in rounds if r.round > 0]
    return {
        "method": settings.method,
        "dataset": settings.data.name,
        "seed": settings.seed,
        "rounds": len(trained),
        "clients": len(last.clients),
        "personal_accuracy": last.mean("personal-accuracy"),
        "global_accuracy": last.mean("global-accuracy"),
        "zeroshot_accuracy": rounds[0].mean("zeroshot-accuracy"),
        "worst_client_accuracy": last.worst("personal-accuracy"),
        "personal_validation_accuracy": last.mean("personal-validation-accuracy"),
        "global_validation_accuracy": last.mean("global-validation-accuracy"),
        "seconds": round(sum(r.seconds for r in rounds), 3),
        "bytes_down": sum(sum(r.bytes_down.values()) for r in trained),
        "bytes_up": sum(sum(r.bytes_up.values()) for r in trained),
        "participations": sum(len(r.bytes_down) for r in trained),
        "failures": sum(len(r.failed) for r in rounds),
    }


def _client_rows(
    rounds: Sequence[Round], cards: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    last = next(r for r in reversed(rounds) if r.clients)
    metrics = ("personal-accuracy", "global-accuracy", "personal-validation-accuracy")
    rows = []
    for card in cards:
        client_id = card["client"]
        row = dict(card)
        measured = last.clients.get(client_id, {})
        row |= {m.replace("-", "_"): measured.get(m, "") for m in metrics}
        row["zeroshot_accuracy"] = rounds[0].clients.get(client_id, {}).get("zeroshot-accuracy", "")
        row["participations"] = sum(client_id in r.bytes_up for r in rounds)
        row["bytes_down"] = sum(r.bytes_down.get(client_id, 0) for r in rounds)
        row["bytes_up"] = sum(r.bytes_up.get(client_id, 0) for r in rounds)
        rows.append(row)
    return rows


def _number(text: str) -> int | float | None:
    if not text:
        return None
    return int(text) if text.isdecimal() else float(text)
