"""What a report of any run folders holds: which tables, from which numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.report import document as doc
from pfedmoap_flwr.report import statistics
from pfedmoap_flwr.report.collect import Collection
from pfedmoap_flwr.report.document import Cell, Column, Mark, Report, Table
from pfedmoap_flwr.report.measures import (
    RULES,
    Metric,
    Rule,
    chosen_metrics,
    client_frame,
    run_frame,
    usual_metrics,
)
from pfedmoap_flwr.report.paper import paper_cells
from pfedmoap_flwr.runs.folder import PLACES

CURVES = ("personal-accuracy", "global-accuracy")
MOST_POINTS = 300_000  # of all clients' curves: a page of about 2 MB
BY = ("method", "dataset", "seed", "client", "domain")


@dataclass(frozen=True)
class Wishes:
    """What is asked of a report. by: what makes a row; () is a method with what it differs in.

    metrics: the first one decides who is best; () for the usual ones.
    """

    by: Sequence[str] = ()
    metrics: Sequence[str] = ()
    rule: Rule = "last"
    against_paper: bool = False


def build(collection: Collection, wishes: Wishes) -> Report:
    """Return the report. Raises UsageError for a metric or a grouping that no run has."""
    methods = dict.fromkeys(collection.labels[run.folder] for run in collection.done)
    sets = dict.fromkeys(collection.datasets[run.folder] for run in collection.done)
    title = f"{len(methods)} methods" if len(methods) > 1 else next(iter(methods), "No method")
    title += f" on {', '.join(sets)}" if sets else ""
    waiting = _unfinished(collection)
    if not collection.done:
        return Report("No run is done", [waiting], [])
    runs, clients = run_frame(collection, wishes.rule), client_frame(collection, wishes.rule)
    groups = usual_metrics(runs)
    if wishes.metrics:
        groups = {"Results": chosen_metrics(wishes.metrics, runs)}
    shown = [metric for metrics in groups.values() for metric in metrics]
    main = shown[0] if shown else None
    tables = _results(collection, runs, clients, groups, wishes)
    ranked = None
    if main is not None and main.is_accuracy:
        tables += _differences(main, runs, clients)
        ranked = statistics.ranking(_blocks(runs, main))
        if ranked:
            tables.append(_ranks(main, ranked))
    if wishes.against_paper:
        tables.append(_paper(collection, runs))
    tables += [waiting] if waiting.rows else []
    tables += [_clients(clients), _settings(collection)]
    curves = _curves(collection)
    notes = doc.provenance(collection, wishes.rule)
    if not curves["whole"]:
        notes.append(
            f"More than {MOST_POINTS:,} points: the page's charts show means over clients."
        )
    return Report(title, tables, notes, ranked, curves)


def _results(
    collection: Collection,
    runs: pd.DataFrame,
    clients: pd.DataFrame,
    groups: dict[str, list[Metric]],
    wishes: Wishes,
) -> list[Table]:
    if not wishes.by:
        by = ["dataset", "label"] if runs["dataset"].nunique() > 1 else ["label"]
        return [
            _grouped(title, runs, by, metrics, wishes.rule, marked=len(runs["label"].unique()) > 1)
            for title, metrics in groups.items()
            if metrics
        ]
    frame = runs
    if "client" in wishes.by or "domain" in wishes.by:
        frame = clients
        groups = {"Results": chosen_metrics(wishes.metrics or ["personal"], clients)}
    frame = frame.assign(**_columns(collection, frame, wishes.by))
    return [
        _grouped(title, frame, list(wishes.by), metrics, wishes.rule)
        for title, metrics in groups.items()
        if metrics
    ]


def _columns(
    collection: Collection, frame: pd.DataFrame, by: Sequence[str]
) -> dict[str, list[Any]]:
    """Return a column of values for every setting by which rows are grouped."""
    flats = {run.folder: run.flat for run in collection.done}
    keys = [key for key in by if key not in BY]
    for key in keys:
        if not any(key in flat for flat in flats.values()):
            raise UsageError(f"--by {key}: is no setting of these runs, nor one of {', '.join(BY)}")
    return {key: [flats[folder].get(key, "-") for folder in frame["folder"]] for key in keys}


def _grouped(
    title: str,
    frame: pd.DataFrame,
    by: Sequence[str],
    metrics: Sequence[Metric],
    rule: Rule,
    *,
    marked: bool = False,
) -> Table:
    """Return a row per group: mean and standard deviation of each metric over its runs."""
    first = metrics[0]
    groups = [(key, group) for key, group in frame.groupby(list(by), sort=False)]
    marks = _marks(frame, metrics) if marked else {}
    several = len(by) > 1
    order = sorted(
        groups,
        key=lambda item: (
            [str(part) for part in item[0][:-1]] if several else [],
            -item[1][first.key].fillna(-1).mean() if first.is_accuracy else 0,
        ),
    )
    rows = []
    for key, group in order:
        names = [Cell(str(part), (part,) if isinstance(part, int) else ()) for part in key]
        cells = [
            doc.spread(metric, group[metric.key], marks.get((*key, metric.key), ""))
            for metric in metrics
        ]
        rows.append([*names, doc.count(len(group)), *cells])
    columns = [Column("method" if name == "label" else name) for name in by]
    notes = []
    if any("±" in cell.text for row in rows for cell in row):
        notes.append("± is the standard deviation over n.")
    if any(mark == "same" for mark in marks.values()):
        notes.append(
            "≈ cannot be told from the best of its data set: the 95 % interval of their paired "
            "difference over seeds holds 0."
        )
    headings = [doc.heading(metric) for metric in metrics]
    name = title.lower().replace(" ", "-")
    title += f", {RULES[rule]}" if first.is_accuracy else ", bytes per client and round"
    return Table(name, title, [*columns, Column("n", ("n",)), *headings], rows, notes)


def _marks(runs: pd.DataFrame, metrics: Sequence[Metric]) -> dict[tuple[object, ...], Mark]:
    """Return by (dataset, label, metric) who is best and who cannot be told from it."""
    marks: dict[tuple[object, ...], Mark] = {}
    several = runs["dataset"].nunique() > 1
    for dataset, group in runs.groupby("dataset", sort=False):
        place = (dataset,) if several else ()
        for metric in metrics:
            best = statistics.best_label(group, metric.key) if metric.is_accuracy else None
            if best is None or statistics.all_equal(group, metric.key):
                continue
            marks[(*place, best, metric.key)] = "best"
            for other in group["label"].unique():
                found = statistics.difference(best, other, metric.key, group, pd.DataFrame())
                if other != best and found.by_seed.verdict == "no":
                    marks[(*place, other, metric.key)] = "same"
    return marks


VERDICTS = {
    "yes": "lower",
    "no": "cannot be told from the best",
    "unknown": "one seed says nothing",
}


def _differences(metric: Metric, runs: pd.DataFrame, clients: pd.DataFrame) -> list[Table]:
    """Return the table of what the best of each data set has over the others."""
    rows = []
    for dataset, group in runs.groupby("dataset", sort=False):
        best = statistics.best_label(group, metric.key)
        if best is None:
            continue
        of_set = clients[clients["dataset"] == dataset]
        means = statistics.label_means(group, metric.key).drop(best)
        for other in means.sort_index().sort_values(ascending=False).index:
            found = statistics.difference(best, other, metric.key, group, of_set)
            sides = (found.better, found.worse, found.equal)
            rows.append(
                [
                    doc.text(dataset),
                    doc.text(other),
                    doc.text(best),
                    doc.difference(metric, found.by_seed),
                    doc.count(found.by_seed.n),
                    doc.difference(metric, found.by_client),
                    Cell(" / ".join(map(str, sides)), sides),
                    doc.text(VERDICTS[found.by_seed.verdict]),
                ]
            )
    if not rows:
        return []
    ends = ("mean", "low", "high")
    columns = [
        *(Column("data set"), Column("method"), Column("best")),
        Column("best less this, by seed", ends, "by_seed"),
        Column("seeds", ("n",)),
        Column("by client", ends),
        Column("clients better / worse / equal", ("better", "worse", "equal"), "clients"),
        Column("verdict"),
    ]
    notes = [
        "Differences of the same seeds, and of the same clients in each, with 95 % intervals by "
        "Student's t; not corrected for how many are compared.",
        "Clients of one seed share a server: their interval speaks of these federations, the "
        "seeds' of others like them. The verdict is by seed.",
    ]
    title = f"Against the best by {metric.title}"
    if runs["dataset"].nunique() == 1:
        title = f"Against {rows[0][2].text}, the best by {metric.title}"
        columns, rows = [columns[1], *columns[3:]], [[row[1], *row[3:]] for row in rows]
    return [Table("differences", title, columns, rows, notes + _unpaired(clients))]


def _unpaired(clients: pd.DataFrame) -> list[str]:
    """Return a note of seeds under which methods did not have the same clients."""
    divided = clients.groupby(["dataset", "seed"])["partition"].nunique()
    seeds = sorted({str(seed) for (_, seed), count in divided.items() if count > 1})
    if not seeds:
        return []
    return [
        f"Seed {', '.join(seeds)}: runs divide the images otherwise; such clients are not paired."
    ]


def _blocks(runs: pd.DataFrame, metric: Metric) -> pd.DataFrame:
    """Return a row per data set and seed, a column per label."""
    return runs.pivot(index=["dataset", "seed"], columns="label", values=metric.key)


def _ranks(metric: Metric, ranked: statistics.Ranking) -> Table:
    rows = [[doc.text(label), Cell(f"{r:.2f}", (float(r),))] for label, r in ranked.ranks.items()]
    sets = ranked.blocks.index.get_level_values("dataset").nunique()
    notes = [
        f"Friedman's test over {len(ranked.blocks)} blocks (data set x seed): "
        f"χ² = {ranked.statistic:.2f}, p = {ranked.p:.3g}. "
        f"Nemenyi's critical difference at 5 %: {ranked.critical:.2f}.",
    ]
    if sets == 1:
        notes.append("All blocks are seeds of one data set: it says nothing about others.")
    columns = [Column("method"), Column("average rank", ("rank",), "rank")]
    return Table("ranks", f"Ranks by {metric.title}", columns, rows, notes)


def _paper(collection: Collection, runs: pd.DataFrame) -> Table:
    """Return the paper's numbers beside the runs of the same data set and kind."""
    rows, notes = [], set()
    for (dataset, label), group in runs.groupby(["dataset", "label"], sort=False):
        [run] = [run for run in collection.done if run.folder == group["folder"].iloc[0]]
        for cell in paper_cells(run):
            metric = Metric(cell.metric)
            mean, sd = cell.mean / 100, cell.spread / 100
            ours = group[metric.key].mean()
            rows.append(
                [
                    doc.text(dataset),
                    doc.text(label),
                    doc.text(f"{cell.table}, {cell.row}"),
                    Cell(f"{cell.mean:.2f} ± {cell.spread:.2f}", (mean, sd)),
                    doc.spread(metric, group[metric.key]),
                    doc.count(len(group)),
                    Cell(doc.shown(metric, ours - mean), (ours - mean,)),
                    doc.text(cell.otherwise(run) or "nothing that was written down"),
                ]
            )
            notes |= {f"{cell.table}: {cell.note}."} if cell.note else set()
    columns = [
        *(Column("data set"), Column("method"), Column("paper's row")),
        Column("paper, %", ("mean", "sd"), "paper"),
        Column("here, %", ("mean", "sd"), "here"),
        Column("n", ("n",)),
        Column("here less paper", ("mean",), "difference"),
        Column("protocol differs in"),
    ]
    if not rows:
        notes = {"The paper has no number for any of these data sets and methods."}
    return Table("paper", "Beside the paper", columns, rows, sorted(notes))


def _unfinished(collection: Collection) -> Table:
    rows = [
        [
            doc.text(collection.labels[run.folder]),
            doc.count(run.settings.seed),
            doc.text(run.state),
            doc.text(run.folder),
        ]
        for run in collection.runs
        if not run.is_done
    ]
    rows += [
        [doc.text("-"), doc.text("-"), doc.text(why), doc.text(folder)]
        for folder, why in collection.left_out.items()
    ]
    columns = [Column("method"), Column("seed", ("seed",)), Column("state"), Column("folder")]
    return Table("left-out", "In no table above", columns, rows)


def _clients(clients: pd.DataFrame) -> Table:
    """Return a row per client of every run."""
    names = ["dataset", "label", "seed", "client", "domain", "classes"]
    keys = [k for k in clients.columns if k not in {*names, "method", "folder", "partition"}]
    metrics = [Metric(str(key)) for key in keys if "validation" not in str(key)]
    rows = [
        [
            *(doc.text(row[name]) for name in ("dataset", "label")),
            *(doc.count(row[name]) for name in ("seed", "client")),
            *(doc.text(row[name]) for name in ("domain", "classes")),
            *(_single(metric, row[metric.key]) for metric in metrics),
        ]
        for row in clients.to_dict("records")
    ]
    columns = [
        *(Column("data set"), Column("method"), Column("seed", ("seed",))),
        *(Column("client", ("client",)), Column("domain"), Column("classes")),
        *(doc.heading(metric, ("value",)) for metric in metrics),
    ]
    return Table("clients", "Clients", columns, rows, long=True)


def _settings(collection: Collection) -> Table:
    """Return every setting of the runs with its value, or all that it has."""
    said: dict[str, dict[str, None]] = {}
    for run in collection.done:
        for key, value in run.flat.items():
            if key not in PLACES:
                said.setdefault(key, {})[str(value)] = None
    rows = [[doc.text(key), doc.text(", ".join(values))] for key, values in said.items()]
    return Table("settings", "Settings", [Column("key"), Column("value")], rows, long=True)


def _single(metric: Metric, value: float) -> Cell:
    return Cell("-", (None,)) if pd.isna(value) else Cell(doc.shown(metric, value), (value,))


def _curves(collection: Collection) -> dict[str, Any]:
    """Return every run's accuracies by round: of each client, or where those are many, means."""
    points = sum(len(r.clients) for run in collection.done for r in run.rounds) * len(CURVES)
    whole = points <= MOST_POINTS
    runs = []
    for run in collection.done:
        rounds = [record for record in run.rounds if record.clients]
        clients = sorted({client for record in rounds for client in record.clients})
        said = {
            "method": collection.labels[run.folder],
            "dataset": collection.datasets[run.folder],
            "seed": run.settings.seed,
            "rounds": [record.round for record in rounds],
            "clients": clients if whole else [],
        }
        for name in CURVES:
            said[name] = [
                [record.clients.get(client, {}).get(name) for client in clients]
                if whole
                else [record.mean(name)]
                for record in rounds
            ]
        runs.append(said)
    return {"runs": runs, "whole": whole}
