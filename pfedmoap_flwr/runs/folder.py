"""The run folder: settings, environment, partition, rounds, clients, summary, checkpoint."""

import csv
import functools
import json
import logging
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from pfedmoap_flwr import files
from pfedmoap_flwr.config import Settings, parse
from pfedmoap_flwr.data.settings import DataSettings
from pfedmoap_flwr.errors import RunFailed, UsageError, last_line
from pfedmoap_flwr.methods import outside
from pfedmoap_flwr.methods.base import ServerState
from pfedmoap_flwr.runs import checkpoint
from pfedmoap_flwr.runs.choice import choices, chosen
from pfedmoap_flwr.runs.environment import environment
from pfedmoap_flwr.runs.heads import RUN_ID
from pfedmoap_flwr.runs.open_classes import (
    new_accuracies,
    open_accuracies,
    other_accuracies,
)
from pfedmoap_flwr.runs.place import folder_named, make_folder, new_folder
from pfedmoap_flwr.runs.record import Round, last_measured
from pfedmoap_flwr.runs.scores import save_scores
from pfedmoap_flwr.spreadsheet import csv_text

FROM_A_COPY = "put the file back from a copy"
logger = logging.getLogger("flwr.pfedmoap")

# Where a run lies and how it is reached, not what it computes
PLACES = (
    "run-dir",
    "resume",
    "state-dir",
    "min-nodes",
    "node-timeout",
    "device",
    "clients-at-once",
    "log-format",
    "tracker",
    "server.metrics-port",
)


class RunFolder:
    """One run on disk. A file is replaced whole; rounds.jsonl grows by whole lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.best = path / "best"

    @classmethod
    def find(cls, settings: Settings) -> "RunFolder":
        """Return the folder of a run that is to start, made where it is new, or to continue.

        Raises UsageError where there can be none, or it holds another run already.
        """
        if settings.resume:
            path = folder_named("resume", settings.resume)
            load_settings(path)
            return cls(path)
        if not settings.run_dir:
            return cls(new_folder(settings))
        path = folder_named("run-dir", settings.run_dir)
        check_unused(path)
        make_folder("run-dir", path)
        return cls(path)

    def start(self, settings: Settings) -> None:
        """Write the settings and the environment of a new run."""
        check_unused(self.path)
        self.forget_ending()
        self._write("settings.json", settings.flat())
        self._write("environment.json", {"run_id": uuid4().hex, **_made_with(settings.method)})

    def reopen(self, settings: Settings) -> ServerState:
        """Return the state from which a run goes on, and change nothing.

        Raises UsageError where something is damaged or a setting that decides the numbers differs
        from the first run's.
        """
        check_same(load_settings(self.path), settings)
        self._check_method(settings.method)
        rounds = self.rounds()
        checkpoint.check_there(self.path)
        return checkpoint.load(self.path, [r.round for r in rounds], self.run_id)

    def _check_method(self, name: str) -> None:
        """Raise UsageError where a method's file is not what the run began with."""
        now, path = outside.origin(name), self.path / "environment.json"
        began = _read_json(path).get("method_sha256") if path.exists() else None
        if "method_file" in now and now["method_sha256"] != began:
            raise UsageError(
                f"method file {now['method_file']}: is not as it was when the run in {self.path} "
                "began; put the file back, or begin a new run"
            )

    def go_on(self, server_round: int) -> None:
        """Make a round the last one on disk: what is after it, and how the run ended, goes."""
        record, rounds = self.path / "rounds.jsonl", self.rounds()
        if not record.read_bytes().endswith(b"\n"):
            logger.warning("%s: the last line was cut off and is dropped", record)
        kept = [r for r in rounds if r.round <= server_round]
        with self._writing("rounds.jsonl"):
            checkpoint.restore(self.path, [r.round for r in kept], self.run_id)
            files.replace(record, "".join(r.to_json() + "\n" for r in kept))
        self.forget_ending()
        self._write_resumed(server_round)

    def _write_resumed(self, server_round: int) -> None:
        """Add to environment.json what the rounds to come are made with, as far as it is new."""
        began = _read_json(self.path / "environment.json")
        now = _made_with(load_settings(self.path).method)
        new = {name: value for name, value in now.items() if value != began.get(name)}
        resumed = [*began.get("resumed", []), {"after_round": server_round, **new}]
        self._write("environment.json", {**began, "resumed": resumed})

    @functools.cached_property
    def run_id(self) -> str:
        """A random id, 32 hex digits: two runs never have the same, whatever their names.

        Raises UsageError where environment.json is damaged.
        """
        path = self.path / "environment.json"
        run_id = _read_json(path).get("run_id") if path.exists() else None
        if not isinstance(run_id, str) or not RUN_ID.fullmatch(run_id):
            raise UsageError(f"{path}: has no run_id of 32 hexadecimal digits; {FROM_A_COPY}")
        return run_id

    def save_partition(self, manifest: Mapping[str, Any]) -> None:
        """Write partition.json: which client holds which images."""
        self._write("partition.json", manifest, indent=None)

    def save_data(self, origins: Sequence[Mapping[str, Any]]) -> None:
        """Write data.json: where which clients' images come from."""
        self._write("data.json", origins)

    def append_round(self, record: Round) -> None:
        """Add a line to rounds.jsonl. Raises RunFailed where it cannot be written."""
        with self._writing("rounds.jsonl"):
            files.append_line(self.path / "rounds.jsonl", record.to_json())

    def save_state(self, state: ServerState) -> None:
        """Write the checkpoint. Raises RunFailed where it cannot be written; the old one stays."""
        with self._writing(checkpoint.FILE):
            checkpoint.save(state, self.path, self.run_id)

    def save_scores(self, classnames: Sequence[str], min_count: int) -> None:
        """Write scores.json and scores.csv, where clients have scores."""
        with self._writing("scores.json"):
            save_scores(self.path, self.rounds(), classnames, min_count)

    def save_best(self, state: ServerState) -> None:
        """Write the state of the best round to best/. Raises RunFailed where it cannot."""
        with self._writing(f"best/{checkpoint.FILE}"):
            self.best.mkdir(exist_ok=True)
            checkpoint.save(state, self.best, self.run_id)

    def rounds(self) -> list[Round]:
        """Return all rounds that were written whole. Raises UsageError naming a damaged line."""
        path = self.path / "rounds.jsonl"
        if not path.is_file():
            return []
        # What follows the last line's end was cut off while being written
        lines = path.read_bytes().split(b"\n")[:-1]
        found = []
        for number, line in enumerate(lines, start=1):
            try:
                found.append(Round.from_json(line))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UsageError(
                    f"{path}, line {number}: is no round ({type(error).__name__}: {error}); put "
                    "the file back from a copy, or remove that line and do without its numbers"
                ) from error
        return found

    def clients(self) -> list[dict[str, Any]]:
        """Return the lines of clients.csv, numbers as numbers; None where a client has none."""
        with (self.path / "clients.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        return [
            {k: v if k in ("domain", "chosen") else _number(v) for k, v in row.items()}
            for row in rows
        ]

    def summary(self) -> dict[str, Any]:
        """Return what summary.json holds."""
        return _read_json(self.path / "summary.json")

    def finish(self, settings: Settings, cards: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Write clients.csv and summary.json and return the summary."""
        rounds = self.rounds()
        rows = _client_rows(settings.data, rounds, cards)
        names = list(rows[0])
        table = csv_text(names, ([row[name] for name in names] for row in rows))
        with self._writing("clients.csv"):
            files.replace(self.path / "clients.csv", table)
        summary = summarise(settings, rounds)
        self._write("summary.json", summary)
        return summary

    def forget_ending(self) -> None:
        """Remove what says how an earlier run in this folder ended."""
        for ending in ("summary.json", "error.txt"):
            (self.path / ending).unlink(missing_ok=True)

    def forget_beginning(self) -> None:
        """Remove the rounds of a run without a checkpoint: it can only begin anew."""
        (self.path / "rounds.jsonl").unlink(missing_ok=True)

    def failure(self) -> str | None:
        """Return in a line why the run failed; None where nothing says that it did."""
        path = self.path / "error.txt"
        if not path.exists():
            return None
        return last_line(path.read_text(errors="replace")) or "no reason was written"

    def fail(self, error: Exception) -> None:
        """Leave the reason why a run ended, for the command that started it."""
        known = isinstance(error, UsageError | RunFailed)
        reason = str(error) if known else "".join(traceback.format_exception(error))
        try:
            files.replace(self.path / "error.txt", reason)
        except OSError as full:
            logger.error("%s cannot be written (%s)", self.path / "error.txt", full)

    def _write(self, name: str, said: Any, indent: int | None = 2) -> None:
        with self._writing(name):
            files.replace(self.path / name, json.dumps(said, indent=indent))

    @contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        """Turn an OSError into a RunFailed of one line: nothing that was there is lost."""
        try:
            yield
        except OSError as error:
            raise RunFailed(
                f"{self.path / name} cannot be written ({error.strerror or error}); make room "
                f"there, then go on with resume={self.path}"
            ) from error


def _made_with(method: str) -> dict[str, str]:
    """Return what this process runs a method with, and where one from outside came from."""
    return {**environment(), **outside.origin(method)}


def load_settings(run_dir: Path) -> Settings:
    """Read the settings of an earlier run. Raises UsageError where they are gone or damaged."""
    path = run_dir / "settings.json"
    try:
        said = _read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"resume={run_dir}: no settings.json there; give a run's folder") from None
    try:
        return parse(said)
    except UsageError as error:
        raise UsageError(f"{path}: {error}; {FROM_A_COPY}") from error


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises UsageError naming file and line where there is another thing."""
    try:
        said = json.loads(path.read_bytes())
    except PermissionError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        place = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UsageError(f"{path}{place}: is not JSON; {FROM_A_COPY}") from error
    if not isinstance(said, dict):
        raise UsageError(f"{path}, line 1: is no table of keys and values; {FROM_A_COPY}")
    return said


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
    rounds = before.num_server_rounds
    if now.optimizer.lr_schedule == "cosine" and now.num_server_rounds != rounds:
        raise UsageError(
            f"setting num-server-rounds={now.num_server_rounds}: with optimizer.lr-schedule="
            f"'cosine' rates fall over all of the run's {rounds} rounds, which then may not change"
        )


def summarise(settings: Settings, rounds: Sequence[Round]) -> dict[str, Any]:
    """Return what summary.json holds: accuracies of the last evaluation, bytes of all rounds."""
    last = last_measured(rounds)
    trained = [r for r in rounds if r.round > 0]
    held_most = [size for r in trained for size in r.memory.values()]
    spent = [r.metrics["epsilon"] for r in trained if "epsilon" in r.metrics]
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
        **open_accuracies(rounds[0], last),
        **new_accuracies(last),
        **other_accuracies(last),
        **choices(rounds),
        "seconds": round(sum(r.seconds for r in rounds), 3),
        "bytes_down": sum(sum(r.bytes_down.values()) for r in trained),
        "bytes_up": sum(sum(r.bytes_up.values()) for r in trained),
        "participations": sum(len(r.bytes_down) for r in trained),
        "failures": sum(len(r.failed) for r in rounds),
        **({"peak_memory": max(held_most)} if held_most else {}),
        **({"epsilon": spent[-1]} if spent else {}),
    }


def _client_rows(
    data: DataSettings, rounds: Sequence[Round], cards: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    last = last_measured(rounds)
    metrics = ["personal-accuracy", "global-accuracy", "personal-validation-accuracy"]
    metrics += sorted(
        {m for measured in last.clients.values() for m in measured if "novel" in m or "unseen" in m}
    )
    rows = []
    for card in cards:
        client_id = card["client"]
        row = dict(card)
        measured = last.new_clients.get(client_id) or last.clients.get(client_id, {})
        if data.new_clients:
            row["new"] = int(not data.trains(client_id))
        row |= {m.replace("-", "_"): measured.get(m, "") for m in metrics}
        before = rounds[0].clients.get(client_id, {}) | last.new_clients.get(client_id, {})
        row["zeroshot_accuracy"] = before.get("zeroshot-accuracy", "")
        row["chosen"] = chosen(measured)
        row["participations"] = sum(client_id in r.bytes_up for r in rounds)
        row["bytes_down"] = sum(r.bytes_down.get(client_id, 0) for r in rounds)
        row["bytes_up"] = sum(r.bytes_up.get(client_id, 0) for r in rounds)
        rows.append(row)
    return rows


def _number(text: str) -> int | float | None:
    if not text:
        return None
    return int(text) if text.isdecimal() else float(text)
