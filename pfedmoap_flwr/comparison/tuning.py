"""Values of settings searched for each method, by the same budget and on validation images alone.

A trial is a run with its own folder, as a cell of a comparison is: which trials are done, and what
they tried, is read from there. What a trial tries follows from those before it and from the seed,
so that a search that was stopped goes on as if it had not been.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pfedmoap_flwr import config, files
from pfedmoap_flwr.comparison import jobs
from pfedmoap_flwr.comparison.cells import Cell, belongs
from pfedmoap_flwr.errors import RunFailed, UsageError
from pfedmoap_flwr.randomness import derive_seed
from pfedmoap_flwr.runs.folder import load_settings
from pfedmoap_flwr.settings import Span, Value
from pfedmoap_flwr.spreadsheet import csv_text

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

Search = Mapping[str, Span | Sequence[Value]]
"""What each setting is searched in: a span of numbers, or some values."""
DRAWN = 5
"""The first trials, the default's included, whose values do not follow from results."""
METRICS = ("personal_validation_accuracy", "global_validation_accuracy")


@dataclass(frozen=True)
class Trial:
    """A run of a search. value: its accuracy on validation images; None: it failed."""

    number: int
    params: Mapping[str, Value]
    value: float | None
    reason: str = ""


@dataclass(frozen=True)
class Budget:
    """What every method gets: trials, the settings that all have, what is searched, the measure."""

    trials: int
    values: Mapping[str, Value]
    search: Search
    metric: str = METRICS[0]


Tell = Callable[[str, Trial], None]
"""Called with the method when a trial has ended."""


def tune(method: str, budget: Budget, root: Path, tell: Tell) -> list[Trial]:
    """Run the trials that are left of a method; write its CSV and, where one is good, its conf.

    Trial 0 has the values of before, the method's defaults in most cases, where the search has
    them. Returns all trials.

    Raises:
        UsageError: optuna is missing, no setting of the search is the method's, or a folder holds
            a trial of another search.
    """
    search = {key: where for key, where in budget.search.items() if belongs(key, method)}
    if not search:
        raise UsageError(f"tune {method}: no setting of --search is one of {method}'s")
    done: list[Trial] = []
    for number in range(budget.trials):
        done.append(_trial(method, number, search, budget, done, root))
        tell(method, done[-1])
        _write_trials(root / f"{method}.csv", list(search), done)
    if best := best_of(done):
        _write_conf(root / f"{method}.toml", method, best, budget)
    return done


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """Return the trial of the highest value, the first of equals; None where all failed."""
    good = [trial for trial in trials if trial.value is not None]
    return max(good, key=lambda trial: (trial.value or 0.0, -trial.number), default=None)


def read_tuned(root: Path, methods: Sequence[str]) -> dict[str, dict[str, Value]]:
    """Return the values that a search chose for methods; one that was not searched has none.

    Raises UsageError where there are none at all, or a file is no settings.
    """
    there = {name: root / f"{name}.toml" for name in methods}
    found = {name: config.parse_file(path) for name, path in there.items() if path.is_file()}
    if not found:
        raise UsageError(f"--tuned {root}: holds no {methods[0]}.toml, nor another method's")
    return found


def _trial(
    method: str, number: int, search: Search, budget: Budget, done: Sequence[Trial], root: Path
) -> Trial:
    folder = root / method / f"trial-{number:03d}"
    fixed = {**budget.values, "method": method, "eval.split": "validation"}
    if (folder / "settings.json").exists():
        flat = load_settings(folder).flat()
        params = {key: flat[key] for key in search}
        if other := next((k for k in search if not _within(search[k], params[k])), ""):
            raise UsageError(
                f"{folder}: was run with {other}={params[other]}, which is not searched now; give "
                "another --out"
            )
    else:
        params = _suggest(method, number, search, fixed, done)
    seed = config.parse(fixed).seed
    cell = Cell(f"{method}, trial {number}", seed, {**fixed, **params}, folder)
    cell.check()
    reasons: list[str] = []
    if cell.state() != "done":
        jobs.run_here([cell], lambda _, reason: reasons.append(reason))
    if any(reasons):
        return Trial(number, params, None, reasons[0])
    value = cell.result().summary[budget.metric]
    if value is None:
        raise RunFailed(f"{folder}: no client was measured on validation images")
    return Trial(number, params, value)


def _suggest(
    method: str,
    number: int,
    search: Search,
    fixed: Mapping[str, Value],
    done: Sequence[Trial],
) -> dict[str, Value]:
    """Return what a trial tries: first the values of before, then what Optuna's TPE says."""
    settings = config.parse(dict(fixed))
    usual = {key: settings.flat()[key] for key in search}
    if not number and all(_within(search[key], value) for key, value in usual.items()):
        return usual
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {key: _distribution(where) for key, where in search.items()}
    seed = derive_seed(settings.seed, "tune", method, number) % 2**32
    sampler = optuna.samplers.TPESampler(n_startup_trials=DRAWN, seed=seed)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.add_trials([_frozen(trial, distributions) for trial in done])
    return dict(study.ask(distributions).params)


def _frozen(trial: Trial, distributions: "dict[str, BaseDistribution]") -> "FrozenTrial":
    from optuna.trial import TrialState, create_trial

    failed = trial.value is None
    return create_trial(
        state=TrialState.FAIL if failed else TrialState.COMPLETE,
        value=trial.value,
        params=dict(trial.params),
        distributions=distributions,
    )


def _distribution(where: Span | Sequence[Value]) -> "BaseDistribution":
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if not isinstance(where, Span):
        return CategoricalDistribution(tuple(where))
    if where.whole:
        return IntDistribution(int(where.low), int(where.high), log=where.log)
    return FloatDistribution(where.low, where.high, log=where.log)


def _within(where: Span | Sequence[Value], value: Value) -> bool:
    if not isinstance(where, Span):
        return value in where
    return isinstance(value, int | float) and where.low <= value <= where.high


def _write_trials(path: Path, keys: Sequence[str], trials: Sequence[Trial]) -> None:
    rows = [[t.number, t.value, *(t.params[k] for k in keys), t.reason] for t in trials]
    files.replace(path, csv_text(["trial", "value", *keys, "failed"], rows))


def _write_conf(path: Path, method: str, best: Trial, budget: Budget) -> None:
    said = (
        f"# The best of {budget.trials} trials by {budget.metric}: trial {best.number}, "
        f"{best.value:.4f}\n# {path.stem}.csv has them all, {method}/ their runs\n"
    )
    files.replace(path, said + config.toml({"method": method, **best.params}))
