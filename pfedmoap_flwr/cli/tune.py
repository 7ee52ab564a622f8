"""pfedmoap tune: settings searched for each method, one budget for all, no test image read."""

import importlib.util
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from pfedmoap_flwr import config
from pfedmoap_flwr.cli.say import say
from pfedmoap_flwr.comparison.cells import new_root
from pfedmoap_flwr.comparison.tuning import METRICS, Budget, Trial, best_of, tune
from pfedmoap_flwr.errors import RunFailed, UsageError


def tune_all(methods: Sequence[str], budget: Budget, out: str, console: Console) -> None:
    """Search for each method; print what was found and where it lies.

    Raises UsageError where optuna is missing or the search reads test images, and RunFailed where a
    method has no trial that did not fail, after the others.
    """
    if importlib.util.find_spec("optuna") is None:
        raise UsageError("pfedmoap tune needs optuna; install pfedmoap-flwr[tune]")
    if budget.values.get("eval.split", "validation") != "validation":
        raise UsageError("setting eval.split: a search looks at validation images alone")
    if budget.metric not in METRICS:
        raise UsageError(f"--metric {budget.metric}: must be one of {', '.join(METRICS)}")
    for key in ("run-dir", "resume"):
        if budget.values.get(key):
            raise UsageError(f"setting {key}: is for one run; a search has its own folder")
    for method in methods:
        config.parse({**budget.values, "method": method})
    root = new_root(out, "tune")

    def tell(method: str, trial: Trial) -> None:
        said = f"failed: {trial.reason}" if trial.value is None else f"{trial.value:.1%}"
        tried = " ".join(f"{key}={_short(value)}" for key, value in trial.params.items())
        say(console, f"[{trial.number + 1}/{budget.trials}] {method} {tried}  {said}")

    found = {method: tune(method, budget, root, tell) for method in dict.fromkeys(methods)}
    table = Table(title=f"best of {budget.trials} trials each, by {budget.metric}")
    for name in ("method", "first trial", "best", "its values"):
        table.add_column(name, justify="left" if name in ("method", "its values") else "right")
    for method, trials in found.items():
        best, first = best_of(trials), trials[0].value
        if best:
            chosen = " ".join(f"{key}={_short(value)}" for key, value in best.params.items())
            before = "failed" if first is None else f"{first:.1%}"
            table.add_row(method, before, f"{best.value:.1%}", chosen)
    console.print(table)
    say(console, f"chosen values, a file a method, and all trials in {root}")
    if failed := [method for method, trials in found.items() if not best_of(trials)]:
        raise RunFailed(f"every trial failed of {', '.join(failed)}: {found[failed[0]][-1].reason}")


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
