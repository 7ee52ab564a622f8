"""The numbers of runs, by a reporting rule, as pandas tables: a row per run, or per client."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal

import pandas as pd

from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.report.collect import Collection, Run
from pfedmoap_flwr.report.tables import (
    ACCURACIES,
    NEW_CLIENTS,
    OPEN_CLASSES,
    VALIDATION,
    per_participation,
)
from pfedmoap_flwr.runs.folder import summarise
from pfedmoap_flwr.runs.record import Round

Rule = Literal["last", "mean5"]
RULES = {"last": "after the last round", "mean5": "mean of the last five rounds"}
Unit = Literal["%", "bytes", "MB", "s", ""]
TITLES = {
    **{
        key.removesuffix("_accuracy"): title
        for key, title in (ACCURACIES | OPEN_CLASSES | NEW_CLIENTS | VALIDATION).items()
    },
    "chosen": "the model chosen by validation",
    "best_round": "the same in the best validated round",
    "worst_decile": "worst decile",
    "bytes_down": "bytes down",
    "bytes_up": "bytes up",
    "peak_memory": "peak memory",
}
CHOICES = ("chosen", "best_round")
COSTS: dict[str, Unit] = {
    "bytes_down": "bytes",
    "bytes_up": "bytes",
    "peak_memory": "MB",
    "seconds": "s",
    "failures": "",
    "epsilon": "",
}


@dataclass(frozen=True)
class Metric:
    """A column of numbers. name: as it is typed, "personal-hm"; key: of the pandas tables."""

    key: str

    @property
    def name(self) -> str:
        """How it is typed."""
        return self.key.replace("_", "-")

    @property
    def title(self) -> str:
        """What it is called in a table."""
        return TITLES.get(self.key, self.key.replace("_", " "))

    @property
    def unit(self) -> Unit:
        """As it is printed: inside, an accuracy is a fraction and memory is in bytes."""
        return COSTS.get(self.key, "%")

    @property
    def is_accuracy(self) -> bool:
        """Whether more is better."""
        return self.unit == "%"


def ended(rounds: Sequence[Round], rule: Rule) -> Round:
    """Return the last round that was measured; by mean5 with each client's mean of five rounds.

    Where fewer were measured after training began, all of them.
    """
    measured = [r for r in rounds if r.clients and r.round > 0] or [r for r in rounds if r.clients]
    if rule == "last":
        return measured[-1]
    five = measured[-5:]
    means = {}
    for client in measured[-1].clients:
        of_client = [r.clients[client] for r in five if client in r.clients]
        names = of_client[-1]
        means[client] = {n: fmean(m[n] for m in of_client if n in m) for n in names}
    return replace(measured[-1], clients=means)


def worst_decile(accuracies: Sequence[float]) -> float | None:
    """Return the mean of the lowest tenth of clients, of one client at least; None without any."""
    count = math.ceil(len(accuracies) / 10)
    return fmean(sorted(accuracies)[:count]) if count else None


def run_frame(collection: Collection, rule: Rule) -> pd.DataFrame:
    """Return a row per run that is done: label, dataset, method, seed, folder and its numbers.

    Bytes are those of one participation.
    """
    return pd.DataFrame([_row(run, collection, rule) for run in collection.done])


def _row(run: Run, collection: Collection, rule: Rule) -> dict[str, object]:
    end = ended(run.rounds, rule)
    # The summary's own code, so that a number of a report and of summary.json is one number
    rounds = [end if record.round == end.round else record for record in run.rounds]
    summary = summarise(run.settings, rounds)
    numbers = {
        key.removesuffix("_accuracy"): value
        for key, value in summary.items()
        if key in COSTS or key in OPEN_CLASSES or key.endswith("_accuracy")
    }
    numbers |= per_participation(summary)
    numbers["worst_decile"] = worst_decile(_of_clients(end, "personal-accuracy"))
    return _names(run, collection) | numbers


def client_frame(collection: Collection, rule: Rule) -> pd.DataFrame:
    """Return a row per client of each run that is done: the run's names and its accuracies."""
    rows = []
    for run in collection.done:
        zeroshot = run.rounds[0].clients
        for client, measured in ended(run.rounds, rule).clients.items():
            accuracies = {**zeroshot.get(client, {}), **measured}
            rows.append(
                _names(run, collection)
                | {
                    "client": client,
                    "partition": run.partition,
                    "domain": run.domains.get(client, ""),
                    "classes": run.classes.get(client, ""),
                }
                | {
                    name.removesuffix("-accuracy").replace("-", "_"): value
                    for name, value in accuracies.items()
                }
            )
    return pd.DataFrame(rows)


def chosen_metrics(names: Sequence[str], frame: pd.DataFrame) -> list[Metric]:
    """Return the metrics that were named. Raises UsageError for one that no run has."""
    known = [Metric(str(key)).name for key in frame.columns if key not in NAMES]
    for name in names:
        if name not in known:
            raise UsageError(f"--metric {name}: no run has it; there are {', '.join(known)}")
    return [Metric(name.replace("-", "_")) for name in names]


def usual_metrics(frame: pd.DataFrame) -> dict[str, list[Metric]]:
    """Return the metrics of the usual tables by title; accuracies that no run has are left out.

    Those of validation images stand in where no run has measured any others.
    """
    there = [str(key) for key in frame.columns if frame[key].notna().any() and key not in NAMES]
    usual = ["personal", "global", "zeroshot", "worst_client", "worst_decile"]
    if "personal" not in there:
        usual = ["personal_validation", "global_validation"]
    validation = {"personal_validation", "global_validation"}
    rest = [key for key in there if key not in {*usual, *validation, *CHOICES, *COSTS}]
    groups = {
        "Accuracy": usual,
        "On what nobody trained": rest,
        "What validation images choose": CHOICES,
        "Cost": list(COSTS),
    }
    return {title: [Metric(key) for key in keys if key in there] for title, keys in groups.items()}


def _names(run: Run, collection: Collection) -> dict[str, object]:
    return {
        "label": collection.labels[run.folder],
        "dataset": collection.datasets[run.folder],
        "method": run.settings.method,
        "seed": run.settings.seed,
        "folder": run.folder,
    }


NAMES = ("label", "dataset", "method", "seed", "folder", "client", "partition", "domain", "classes")


def _of_clients(record: Round, metric: str) -> list[float]:
    return [m[metric] for m in record.clients.values() if metric in m]
