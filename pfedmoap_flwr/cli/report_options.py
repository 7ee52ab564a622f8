"""What can be typed after `pfedmoap report`; the work is imported when it runs."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

Rule = Literal["last", "mean5"]
Form = Literal["terminal", "md", "csv", "latex", "html"]


def report(
    folders: Annotated[
        list[Path], typer.Argument(metavar="FOLDER...", help="Runs, or folders of runs.")
    ],
    by: Annotated[
        str,
        typer.Option(
            metavar="KEY,...",
            help="What makes a row: method, dataset, seed, client, domain, or a setting.",
        ),
    ] = "",
    metric: Annotated[
        str, typer.Option(metavar="NAME,...", help="personal, global, ...; the first decides.")
    ] = "",
    rule: Annotated[
        Rule, typer.Option(help="The last round, or the mean of the last five.")
    ] = "last",
    against: Annotated[
        Literal["paper"] | None,
        typer.Option(help="The paper's numbers beside those of the same data set."),
    ] = None,
    form: Annotated[
        Form | None, typer.Option("--format", help="Without --out it goes to standard output.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where files go; all without --format.")
    ] = None,
    to: Annotated[
        str, typer.Option(metavar="TRACKER", help="Send all rounds to tensorboard, mlflow, ...")
    ] = "",
) -> None:
    """Tables, tests and a page of any runs: who is best, and what cannot be told from it."""
    from pfedmoap_flwr.cli.report import report_on
    from pfedmoap_flwr.report.build import Wishes

    keys, names = ([word for word in text.split(",") if word] for text in (by, metric))
    wishes = Wishes(keys, names, rule, against == "paper")
    report_on(folders, wishes, form, out, to, Console())
