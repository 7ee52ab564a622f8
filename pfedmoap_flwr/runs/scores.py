"""The scores of a run's clients on disk: scores.json has all, scores.csv what a table can hold."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pfedmoap_flwr import files
from pfedmoap_flwr.runs.record import Round, last_measured
from pfedmoap_flwr.spreadsheet import csv_text

JSON, CSV = "scores.json", "scores.csv"
COLUMNS = ("client", "model", "metric", "class", "value", "low", "high")


def save_scores(
    run_dir: Path, rounds: Sequence[Round], classnames: Sequence[str], min_count: int
) -> None:
    """Write the last round's scores, where there are any. Raises OSError."""
    scored = last_measured(rounds)
    if not scored.scores:
        return
    said = {
        "round": scored.round,
        "classnames": list(classnames),
        "min_count": min_count,
        "clients": scored.scores,
    }
    files.replace(run_dir / CSV, csv_text(COLUMNS, _rows(scored)))
    files.replace(run_dir / JSON, json.dumps(said))


def load_scores(run_dir: Path) -> dict[str, Any] | None:
    """Return what scores.json holds, clients by number; None where a run asked for none."""
    path = run_dir / JSON
    if not path.is_file():
        return None
    said = json.loads(path.read_text())
    return {**said, "clients": {int(i): scores for i, scores in said["clients"].items()}}


def _rows(record: Round) -> Iterator[tuple[Any, ...]]:
    """Yield COLUMNS for each number of a mean or a class; a class is its number from 0."""
    for client, models in sorted(record.scores.items()):
        for model, scores in models.items():
            for name, value in scores.items():
                metric, _, what = name.partition(".")
                if name in ("few", "withheld", "confusion") or what in ("low", "high"):
                    continue
                ends = (scores.get(f"{name}.{end}", "") for end in ("low", "high"))
                yield client, model, metric, what, value, *ends
