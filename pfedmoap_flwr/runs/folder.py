"""The run folder: settings, environment, partition, rounds, clients, summary, checkpoint."""

import csv
import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from pfedmoap_flwr.assets import asset
from pfedmoap_flwr.config import Settings, parse
from pfedmoap_flwr.errors import UsageError

PACKAGES = ("pfedmoap-flwr", "flwr", "torch", "open_clip_torch", "datasets", "numpy")
# Where a run lies and how it is reached, not what it computes
PLACES = ("run-dir", "resume", "state-dir", "min-nodes", "node-timeout", "device")


@dataclass
class RoundRecord:
    """One line of rounds.jsonl. Bytes are those of training; evaluation only measures."""

    round: int
    seconds: float = 0.0
    train_loss: float | None = None
    bytes_down: dict[int, int] = field(default_factory=dict)
    bytes_up: dict[int, int] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    clients: dict[int, dict[str, float]] = field(default_factory=dict)

    def mean(self, metric: str) -> float | None:
        """Return the unweighted mean over clients (the paper's metric), or None without one."""
        values = [m[metric] for m in self.clients.values() if metric in m]
        return fmean(values) if values else None

    def worst(self, metric: str) -> float | None:
        """Return the lowest value of all clients that have one, or None without one."""
        return min((m[metric] for m in self.clients.values() if metric in m), default=None)

    def line(self, rounds: int) -> str:
        """Return a short progress line."""
        parts = [f"round {self.round}/{rounds}"]
        if self.train_loss is not None:
            parts.append(f"loss {self.train_loss:.3f}")
        for name in ("personal", "global"):
            if (value := self.mean(f"{name}-accuracy")) is not None:
                parts.append(f"{name} {value:.1%}")
        if self.failed:
            parts.append(f"{len(self.failed)} failed")
        return "  ".join([*parts, f"{self.seconds:.1f} s"])


class RunFolder:
    """One run on disk. Every file is written whole or not at all."""

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
        folder._write("settings.json", json.dumps(settings.flat(), indent=2))
        folder._write("environment.json", json.dumps(environment(), indent=2))
        return folder

    @classmethod
    def reopen(cls, settings: Settings, completed: int) -> "RunFolder":
        """Open the folder of a run to continue; rounds after the checkpoint are dropped.

        Raises UsageError where a setting that decides the numbers differs from the first run's.
        """
        folder = cls(Path(settings.resume))
        check_same(load_settings(folder.path), settings)
        folder.forget_ending()
        kept = [r for r in folder.rounds() if r.round <= completed]
        folder._write("rounds.jsonl", "".join(json.dumps(asdict(r)) + "\n" for r in kept))
        return folder

    def save_partition(self, manifest: dict[str, Any]) -> None:
        """Write partition.json: which client holds which images."""
        self._write("partition.json", json.dumps(manifest))

    def save_data(self, origins: list[dict[str, Any]]) -> None:
        """Write data.json: where which clients' images come from."""
        self._write("data.json", json.dumps(origins, indent=2))

    def append_round(self, record: RoundRecord) -> None:
        """Add a line to rounds.jsonl."""
        with (self.path / "rounds.jsonl").open("a") as file:
            file.write(json.dumps(asdict(record)) + "\n")

    def rounds(self) -> list[RoundRecord]:
        """Return all rounds that were written."""
        path = self.path / "rounds.jsonl"
        if not path.is_file():
            return []
        # A last line without its end was cut off while being written
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        return [_record(json.loads(line)) for line in lines]

    def finish(self, settings: Settings, cards: list[dict[str, Any]]) -> dict[str, Any]:
        """Write clients.csv and summary.json and return the summary."""
        rounds = self.rounds()
        rows = _client_rows(rounds, cards)
        with (self.path / "clients.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        summary = summarise(settings, rounds)
        self._write("summary.json", json.dumps(summary, indent=2))
        return summary

    def forget_ending(self) -> None:
        """Remove what says how an earlier run in this folder ended."""
        for ending in ("summary.json", "error.txt"):
            (self.path / ending).unlink(missing_ok=True)

    def fail(self, reason: str) -> None:
        """Leave the reason why a run ended, for the command that started it."""
        self._write("error.txt", reason)

    def _write(self, name: str, text: str) -> None:
        temporary = self.path / f"{name}.tmp"
        temporary.write_text(text)
        os.replace(temporary, self.path / name)


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
    for key in old.keys() - set(PLACES) - {"num-server-rounds"}:
        if old[key] != new[key]:
            raise UsageError(
                f"setting {key}={new[key]!r}: the run to resume has {old[key]!r}; only "
                "num-server-rounds may change"
            )


def environment() -> dict[str, str]:
    """Return versions, device and commit."""
    # Flower runs a copy of the code without history and binary files: those lie in the repository
    repository = asset("clip/mini.safetensors").parent
    git = ["git", "-C", str(repository), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        commit = ""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        **{package: version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": str(os.cpu_count()),
        "device": device,
        "commit": commit or "unknown",
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def summarise(settings: Settings, rounds: list[RoundRecord]) -> dict[str, Any]:
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


def _client_rows(rounds: list[RoundRecord], cards: list[dict[str, Any]]) -> list[dict[str, Any]]:
    last = next(r for r in reversed(rounds) if r.clients)
    metrics = ("personal-accuracy", "global-accuracy", "personal-validation-accuracy")
    rows = []
    for card in cards:
        client = card["client"]
        row = dict(card)
        row |= {m.replace("-", "_"): last.clients.get(client, {}).get(m, "") for m in metrics}
        row["zeroshot_accuracy"] = rounds[0].clients.get(client, {}).get("zeroshot-accuracy", "")
        row["participations"] = sum(client in r.bytes_up for r in rounds)
        row["bytes_down"] = sum(r.bytes_down.get(client, 0) for r in rounds)
        row["bytes_up"] = sum(r.bytes_up.get(client, 0) for r in rounds)
        rows.append(row)
    return rows


def _record(line: dict[str, Any]) -> RoundRecord:
    """JSON turned the client numbers into texts."""
    for name in ("bytes_down", "bytes_up", "failed", "clients"):
        line[name] = {int(client): value for client, value in line[name].items()}
    return RoundRecord(**line)
