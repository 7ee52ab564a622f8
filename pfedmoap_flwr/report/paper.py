"""The paper's numbers beside ours, with what of its protocol a run does not have."""

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from pfedmoap_flwr.report.collect import Run
from pfedmoap_flwr.settings import Value


@dataclass(frozen=True)
class PaperCell:
    """One number of the paper, in percent, and how its table was made.

    metric: what of a run it is compared with.
    """

    table: str
    row: str
    note: str
    metric: str
    mean: float
    spread: float
    protocol: Mapping[str, Value] = field(repr=False)

    def otherwise(self, run: Run) -> str:
        """Return in what a run differs from the table's protocol, "" where in nothing."""
        flat = run.flat
        return ", ".join(
            f"{key}={flat[key]} (paper {asked})"
            for key, asked in self.protocol.items()
            if key in flat and flat[key] != asked
        )


def paper_cells(run: Run) -> list[PaperCell]:
    """Return the paper's numbers for a run's method, settings and data set."""
    return [
        PaperCell(
            table["name"],
            row["label"],
            table.get("note", ""),
            row.get("metric", "personal"),
            mean=row["values"][run.settings.data.name][0],
            spread=row["values"][run.settings.data.name][1],
            protocol=table["protocol"],
        )
        for table in _tables()
        for row in table["rows"]
        if row["method"] == run.settings.method
        and run.settings.data.name in row["values"]
        and all(run.flat.get(key) == value for key, value in row.get("settings", {}).items())
    ]


@functools.cache
def _tables() -> list[dict[str, Any]]:
    text = files("pfedmoap_flwr.report").joinpath("paper.toml").read_text()
    return tomllib.loads(text)["tables"]
