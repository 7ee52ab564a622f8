"""pfedmoap reproduce: a table or figure of the paper, from data to numbers."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from pfedmoap_flwr import config, methods
from pfedmoap_flwr.cli.compare import How, compare_all
from pfedmoap_flwr.cli.data import prepare_features
from pfedmoap_flwr.clip.features import Reading
from pfedmoap_flwr.comparison.experiments import EXPERIMENTS, Experiment
from pfedmoap_flwr.settings import Value


def print_experiments(console: Console) -> None:
    """Print what there is to reproduce."""
    table = Table(title="pfedmoap reproduce NAME")
    for column in ("name", "what", "methods", "data sets", "swept"):
        table.add_column(column, overflow="fold")
    for name, experiment in EXPERIMENTS.items():
        swept = ", ".join(f"{key}={len(v)} values" for key, v in experiment.sweeps.items())
        count = len(experiment.methods)
        table.add_row(
            name,
            experiment.what,
            experiment.methods[0] if count == 1 else str(count),
            ", ".join(experiment.sets),
            swept,
        )
    console.print(table)


def reproduce(
    experiment: Experiment,
    only: Sequence[str],
    seeds: Sequence[int],
    values: Mapping[str, Value],
    how: How,
    console: Console,
) -> None:
    """Prepare the data sets, run what is not done, print the tables.

    Raises RunFailed where a run failed, after all others.
    """
    sweeps = experiment.swept(only)
    if not how.dry:
        for name in sweeps["data.name"]:
            for method in _one_of_each_reading(experiment.methods, values):
                prepare_features({**values, "data.name": name, "method": method}, console)
    compare_all(experiment.methods, seeds, sweeps, values, how, console)


def _one_of_each_reading(names: Sequence[str], values: Mapping[str, Value]) -> list[str]:
    """Return a method for each thing that is read of images, which is computed once for all."""
    readings: dict[Reading, str] = {}
    for name in names:
        settings = config.parse({**values, "method": name})
        readings.setdefault(methods.load(name).reads(settings.own), name)
    return list(readings.values())
