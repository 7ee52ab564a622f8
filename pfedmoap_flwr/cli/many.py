"""Commands over many runs beside `pfedmoap compare`, as they are typed."""

from typing import Annotated

import typer
from rich.console import Console

from pfedmoap_flwr.cli import words
from pfedmoap_flwr.cli.options import SETTINGS, Conf, DryRun, Jobs, Out, Slurm, Words

app = typer.Typer(rich_markup_mode=None)


@app.command(epilog=SETTINGS)
def tune(
    names: Annotated[
        str,
        typer.Argument(metavar="METHOD,...|all", help="For which a search is made."),
    ],
    settings: Words = None,
    conf: Conf = None,
    search: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=LOW..HIGH[:log]|KEY=VALUE,...",
            help="What is searched; repeatable. A method's own key is searched for it alone.",
        ),
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Runs for each method.")] = 20,
    metric: Annotated[
        str, typer.Option(metavar="NAME", help="personal_ or global_validation_accuracy.")
    ] = "personal_validation_accuracy",
    out: Out = "",
) -> None:
    """Search for settings of methods, one budget for all, on validation images alone."""
    chosen = words.read_methods(names)  # first of all: a file brings settings of its own
    values, spaces = words.read(settings, conf), words.read_search(search or [])
    from pfedmoap_flwr.cli.tune import tune_all
    from pfedmoap_flwr.comparison.tuning import Budget

    budget = Budget(trials, values, spaces, metric)
    tune_all(chosen, budget, out, Console())


@app.command("reproduce", epilog=SETTINGS)
def reproduce_paper(
    name: Annotated[
        str, typer.Argument(metavar="[NAME]", help="As table1; without one, what there is.")
    ] = "",
    settings: Words = None,
    only: Annotated[
        str, typer.Option(metavar="SET,...", help="Of its data sets these alone.")
    ] = "",
    seeds: Annotated[str, typer.Option(metavar="SEED,...", help="0-4 is a range.")] = "0,1,2",
    out: Out = "",
    jobs: Jobs = 1,
    slurm: Slurm = "",
    dry_run: DryRun = False,
) -> None:
    """Make a table or figure of the paper: prepare the data sets, run, compare."""
    from pfedmoap_flwr.comparison.experiments import find

    if not name:
        from pfedmoap_flwr.cli.reproduce import print_experiments

        print_experiments(Console())
        return
    experiment = find(name)
    values, numbers = words.read(settings, [experiment.path()]), words.read_seeds(seeds)
    from pfedmoap_flwr.cli.compare import How
    from pfedmoap_flwr.cli.reproduce import reproduce
    from pfedmoap_flwr.comparison.slurm import read_options

    how = How(out, jobs, dry=dry_run, slurm=read_options(slurm))
    sets = only.split(",") if only else []
    reproduce(experiment, sets, numbers, values, how, Console())
