"""What can be typed after `pfedmoap data`; the work is imported when it runs."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pfedmoap_flwr.cli import words
from pfedmoap_flwr.cli.options import SETTINGS, Conf, Method, Words

app = typer.Typer(rich_markup_mode=None, help="Data sets: list, show, prepare.")


@app.command("list")
def list_sets() -> None:
    """Print every data set that has a name, and which are on this machine; no network is used."""
    from pfedmoap_flwr.cli.data import print_sets

    print_sets(Console())


@app.command(epilog=SETTINGS)
def show(
    settings: Words = None,
    conf: Conf = None,
    figure: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw clients x classes, as .png or .svg."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the manifest alone.")] = False,
) -> None:
    """Print who holds which images under the settings; nothing is computed of an image."""
    values = words.read(settings, conf)
    from pfedmoap_flwr.cli.data import print_partition

    print_partition(values, figure, as_json=json, console=Console())


@app.command(epilog=SETTINGS)
def prepare(settings: Words = None, conf: Conf = None, method: Method = None) -> None:
    """Get a data set and weights, check them, and compute all image features a run will read.

    Stopped, it goes on after the last images that were kept.
    """
    values = words.read(settings, conf, method)
    from pfedmoap_flwr.cli.data import prepare_features

    prepare_features(values, Console())
