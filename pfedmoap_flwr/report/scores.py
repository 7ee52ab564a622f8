"""The table of scores at a run's end."""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

MODELS = ("personal", "global")


def print_scores(said: Mapping[str, Any], console: Console) -> None:
    """Print each metric's mean and range over clients, and what was kept back.

    said: what `runs.scores.load_scores` returns.
    """
    clients: Mapping[int, Any] = said["clients"]
    table = Table(title=f"test images of {len(clients)} clients, round {said['round']}")
    table.add_column("metric")
    for model in MODELS:
        table.add_column(f"{model}, mean", justify="right")
        table.add_column("of clients", justify="right")
    names = {name: None for each in clients.values() for scores in each.values() for name in scores}
    for name in names:
        if "." in name or name in ("few", "withheld", "confusion"):
            continue
        cells = []
        for model in MODELS:
            values = [each[model][name] for each in clients.values() if name in each.get(model, {})]
            cells.append(f"{fmean(values):.3f}" if values else "-")
            cells.append(f"{min(values):.2f} - {max(values):.2f}" if values else "-")
        table.add_row(name, *cells)
    console.print(table)
    for key, what in {"few": "all scores", "withheld": "F1 and sensitivity"}.items():
        held = [max(s.get(key, 0) for s in each.values()) for each in clients.values() if each]
        if any(held):
            console.print(
                f"kept back at {sum(n > 0 for n in held)} of {len(clients)} clients, for small "
                f"counts (eval.min-count): {what} of {sum(held)} classes",
                highlight=False,
            )
    matrices = sum("confusion" in each.get("personal", {}) for each in clients.values())
    console.print(
        f"per class, with intervals, and {matrices} confusion matrices: scores.csv, scores.json",
        highlight=False,
    )
