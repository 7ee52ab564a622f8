"""One line on how a run is doing, for an operator's alarm."""

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

from pfedmoap_flwr.runs.folder import RunFolder, load_settings

LEAST_SECONDS = 60.0
PATIENCE = 5.0


@dataclass(frozen=True)
class Health:
    """state: "late" where nothing came for much longer than rounds took so far."""

    state: Literal["ok", "done", "late", "failed"]
    said: str

    @property
    def is_good(self) -> bool:
        """Whether nobody need be called."""
        return self.state in ("ok", "done")

    def line(self) -> str:
        """Return the state in capitals, and what there is to say."""
        return f"{self.state.upper()}  {self.said}"


def health(run_dir: Path, max_age: float | None = None) -> Health:
    """Return how the run in a folder is doing.

    max_age: seconds without a new round after which it is late; None: five times the median of its
    rounds, and a minute at least.

    Raises UsageError where there is no run.
    """
    rounds_asked = load_settings(run_dir).num_server_rounds
    folder = RunFolder(run_dir)
    rounds = folder.rounds()
    last = f"round {rounds[-1].round if rounds else 0}/{rounds_asked}"
    if reason := folder.failure():
        return Health("failed", f"{last}: {reason}")
    if (run_dir / "summary.json").exists():
        return Health("done", last)
    newest = run_dir / ("rounds.jsonl" if rounds else "settings.json")
    age = time.time() - newest.stat().st_mtime
    usual = median(r.seconds for r in rounds) if rounds else 0.0
    limit = max_age if max_age is not None else max(LEAST_SECONDS, PATIENCE * usual)
    failed = f", {len(rounds[-1].failed)} clients failed" if rounds and rounds[-1].failed else ""
    said = f"{last}{failed}, {age:.0f} s ago"
    return Health("late", f"{said}, more than {limit:.0f} s") if age > limit else Health("ok", said)
