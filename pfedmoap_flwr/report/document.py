"""A report before it has a form: its tables, cell by cell, and what is said beside them."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pandas as pd

from pfedmoap_flwr.report.collect import Collection
from pfedmoap_flwr.report.diagram import draw_differences
from pfedmoap_flwr.report.measures import RULES, Metric, Rule
from pfedmoap_flwr.report.statistics import Interval, Ranking

Number = float | int | None
Mark = Literal["", "best", "same"]


@dataclass(frozen=True)
class Cell:
    """text: as it is read. numbers: unrounded, one for each part of its column, or ()."""

    text: str
    numbers: tuple[Number, ...] = ()
    mark: Mark = ""


@dataclass(frozen=True)
class Column:
    """parts: what a cell's numbers are, ("mean", "sd"); () for a column of texts.

    key: what it is called in CSV, its title where that is a word.
    """

    title: str
    parts: tuple[str, ...] = ()
    key: str = ""

    @property
    def headings(self) -> list[str]:
        """Its columns in CSV, "personal_mean" and "personal_sd"."""
        key = self.key or self.title.replace(" ", "_")
        return [f"{key}_{part}" for part in self.parts] if len(self.parts) > 1 else [key]


@dataclass(frozen=True)
class Table:
    """name: of its file. long: has no place on a terminal or a printed page."""

    name: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = ()
    long: bool = False


@dataclass(frozen=True)
class Report:
    """ranked: average ranks, where there are any. curves: what the page's charts draw."""

    title: str
    tables: Sequence[Table]
    notes: Sequence[str]
    ranked: Ranking | None = None
    curves: dict[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def diagram(self) -> str:
        """Critical differences as SVG, or ""; it takes two seconds, and few forms want it."""
        return draw_differences(self.ranked) if self.ranked else ""


def text(said: object) -> Cell:
    """Return a cell that holds a name or a sentence."""
    return Cell(str(said))


def count(number: int) -> Cell:
    """Return a cell that holds a whole number."""
    return Cell(f"{number:,}", (number,))


def shown(metric: Metric, value: float) -> str:
    """Return a number in its metric's unit, without it: an accuracy in percent."""
    if metric.unit == "%":
        return f"{100 * value:.1f}"
    if metric.unit == "MB":
        return f"{value / 1e6:,.0f}"
    return f"{value:,.0f}" if metric.unit or value >= 100 else f"{value:.3g}"


def spread(metric: Metric, values: pd.Series, mark: Mark = "") -> Cell:
    """Return mean and sample standard deviation, "61.2 ± 0.4", "-" where there is none."""
    there = values.dropna()
    if there.empty:
        return Cell("-", (None, None))
    mean = float(there.mean())
    if len(there) < 2:
        return Cell(shown(metric, mean), (mean, None), mark)
    sd = float(there.std())
    return Cell(f"{shown(metric, mean)} ± {shown(metric, sd)}", (mean, sd), mark)


def difference(metric: Metric, found: Interval) -> Cell:
    """Return a difference with its interval, "1.2 [-0.3, 2.7]", "-" where there is none."""
    if not found.n:
        return Cell("-", (None, None, None))
    mean = shown(metric, found.mean)
    if math.isnan(found.low):
        return Cell(mean, (found.mean, None, None))
    ends = f"[{shown(metric, found.low)}, {shown(metric, found.high)}]"
    return Cell(f"{mean} {ends}", (found.mean, found.low, found.high))


def heading(metric: Metric, parts: tuple[str, ...] = ("mean", "sd")) -> Column:
    """Return a metric's column; its unit is in the title."""
    unit = f", {metric.unit}" if metric.unit in ("%", "MB") else ""
    return Column(metric.title + unit, parts, metric.key)


def provenance(collection: Collection, rule: Rule) -> list[str]:
    """Return what has to stand beside any number: rule, seeds, commits, machines, versions."""
    said = [f"Every accuracy: {RULES[rule]}."]
    short = sum(sum(bool(r.clients) for r in run.rounds[1:]) < 5 for run in collection.done)
    if rule == "mean5" and short:
        said.append(f"{short} runs were measured in fewer rounds: all of those.")
    seeds = sorted({run.settings.seed for run in collection.done})
    said.append(f"{len(collection.done)} runs, seeds {', '.join(map(str, seeds))}.")
    made = {_made_with(run.environment) for run in collection.done}
    days = sorted(str(run.environment.get("started", ""))[:10] for run in collection.done)
    if days and days[-1]:
        said.append(f"Run from {days[0] or 'an unknown day'} to {days[-1]}.")
    return said + [f"Made with {each}." for each in sorted(made) if each]


def _made_with(environment: Mapping[str, Any]) -> str:
    """Return what a run was made with, from its start and from where it was resumed on."""
    stages = [environment, *environment.get("resumed", [])]
    said = []
    for key in ("commit", "device", "cores", *PACKAGES):
        values = dict.fromkeys(str(stage[key]) for stage in stages if key in stage)
        said += [f"{key} {' and '.join(values)}"] if values else []
    return ", ".join(said)


PACKAGES = ("pfedmoap-flwr", "torch", "flwr", "open_clip_torch")
