"""Arguments and options that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

from pfedmoap_flwr.cli import words

SETTINGS = "Settings: `pfedmoap settings` lists all, `pfedmoap settings data` those of one group."

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        autocompletion=words.complete_setting,
        show_default=False,
    ),
]
Conf = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE.toml",
        help="A file of settings, repeatable; KEY=VALUE goes over it.",
    ),
]
Method = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE.py",
        help="What is learned: method=NAME, or the Method of a file of yours. `pfedmoap settings "
        "method` lists all.",
        autocompletion=words.complete_method,
    ),
]
Out = Annotated[
    str, typer.Option(metavar="DIR", help="Its folder; what is done there is not run again.")
]
Jobs = Annotated[int, typer.Option(min=1, help="Runs at once, on Ray.")]
Slurm = Annotated[
    str, typer.Option(metavar="KEY=VALUE,...", help="Each a job: partition=gpu,time=2:00:00.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the runs, their time and memory; run none.")
]
Retry = Annotated[
    int,
    typer.Option(
        min=0, metavar="N", help="Go on so many times where the run fails, from its last round."
    ),
]
