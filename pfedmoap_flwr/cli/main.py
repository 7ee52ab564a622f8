"""The command `pfedmoap`: what can be typed, and the exit status of each ending.

What a command does lies in the module of its name. That is imported when the command runs, because
PyTorch, Flower and datasets take seconds, and neither --help nor a wrong setting needs them.
"""

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import click
import typer
from rich.console import Console

from pfedmoap_flwr import methods
from pfedmoap_flwr.cli import words
from pfedmoap_flwr.engines import Engine
from pfedmoap_flwr.errors import RunFailed, UsageError

STOPPED = 130
RIVALS = ",".join(methods.RIVALS)
SEEDS = "0,1,2"
SETTINGS = "Settings: `pfedmoap settings` lists all, `pfedmoap settings data` those of one group."

app = typer.Typer(rich_markup_mode=None)
data_app = typer.Typer(rich_markup_mode=None, help="Data sets: list, show, prepare.")
app.add_typer(data_app, name="data")

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        autocompletion=words.complete_setting,
        show_default=False,
    ),
]
Conf = Annotated[
    Path | None,
    typer.Option(metavar="FILE.toml", help="A file of settings; KEY=VALUE goes over it."),
]
Method = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="What is learned: method=NAME. `pfedmoap settings method` lists all.",
        autocompletion=words.complete_method,
    ),
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    0 done, 1 the run failed, 2 wrong use, 130 stopped.
    """
    typed = list(sys.argv[1:] if arguments is None else arguments)
    errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    signal.signal(signal.SIGTERM, _stop)
    try:
        command = typer.main.get_command(app)
        status = int(command.main(typed, "pfedmoap", standalone_mode=False) or 0)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "pfedmoap"
        errors.print(f"pfedmoap: {error.format_message().rstrip('.')}; see {path} --help")
        return 2
    except UsageError as error:
        errors.print(f"pfedmoap: {error}")
        return 2
    except RunFailed as error:
        errors.print(str(error).rstrip())
        errors.print("pfedmoap: the run failed")
        return 1
    if status == STOPPED:
        run = typed[0] in ("run", "compare")
        how = "a run goes on with: pfedmoap run resume=ITS_FOLDER"
        errors.print(f"pfedmoap: stopped; {how if run else 'the same command goes on from there'}")
    return status


def _print_version(asked: bool) -> None:
    if asked:
        import pfedmoap_flwr

        print(f"pfedmoap-flwr {pfedmoap_flwr.__version__}")
        raise typer.Exit


@app.callback(help="Personalised federated prompt learning for a frozen CLIP.")
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Options of the command itself."""


@app.command(epilog=SETTINGS)
def run(
    settings: Words = None,
    conf: Conf = None,
    method: Method = None,
    engine: Annotated[
        Engine,
        typer.Option(
            help="Compute in this process, which is the default, or in Ray through `flwr run`.",
            show_default=False,
        ),
    ] = "in-process",
) -> None:
    """Run one method with one seed."""
    values = words.read(settings, conf, method)
    from pfedmoap_flwr.cli.run import run_one

    run_one(values, engine, Console())


@app.command(epilog=SETTINGS)
def compare(
    settings: Words = None,
    conf: Conf = None,
    names: Annotated[
        str,
        typer.Option(
            "--methods", metavar="NAME,...", help=f"Default {RIVALS}.", show_default=False
        ),
    ] = RIVALS,
    seeds: Annotated[
        str, typer.Option(metavar="SEED,...", help=f"Default {SEEDS}.", show_default=False)
    ] = SEEDS,
) -> None:
    """Run several methods over several seeds, all else equal."""
    values = words.read(settings, conf)
    numbers = words.read_seeds(seeds)
    from pfedmoap_flwr.cli.compare import compare_all

    compare_all(names.split(","), numbers, values, Console())


@app.command(epilog=SETTINGS)
def doctor(settings: Words = None, conf: Conf = None, method: Method = None) -> None:
    """Say what this machine has, and whether such a run can start here without network.

    The hub is not asked. HF_HUB_OFFLINE=1 keeps a run from asking it too.
    """
    values = words.read(settings, conf, method)
    from pfedmoap_flwr.cli.doctor import examine

    examine(values, Console())


@app.command("settings")
def list_settings(
    prefix: Annotated[
        str,
        typer.Argument(metavar="[PREFIX]", show_default=False),
    ] = "",
) -> None:
    """List settings by group: key, default, what it can be. PREFIX: those that begin so."""
    from pfedmoap_flwr.cli.settings import print_settings

    print_settings(prefix, Console())


@app.command("inspect")
def inspect_run(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a pFedMoAP run.")],
    client: Annotated[
        list[int] | None, typer.Option(metavar="NUMBER", help="Of these clients alone.")
    ] = None,
    figure: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw attention by expert, .png or .svg.")
    ] = None,
) -> None:
    """Show whom the gates of a run listen to: shares of attention, entropy, cosines."""
    from pfedmoap_flwr.cli.inspect import print_gates

    print_gates(run, client or [], figure, Console())


@app.command("methods", epilog=SETTINGS)
def list_methods(settings: Words = None, conf: Conf = None) -> None:
    """List all methods: what travels, what stays, what is read, fidelity, source."""
    values = words.read(settings, conf)
    from pfedmoap_flwr.cli.methods import print_methods

    print_methods(values, Console())


@data_app.command("list")
def list_sets() -> None:
    """Print every data set that has a name, and which are on this machine; no network is used."""
    from pfedmoap_flwr.cli.data import print_sets

    print_sets(Console())


@data_app.command(epilog=SETTINGS)
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


@data_app.command(epilog=SETTINGS)
def prepare(settings: Words = None, conf: Conf = None, method: Method = None) -> None:
    """Get a data set and weights, check them, and compute all image features a run will read.

    Stopped, it goes on after the last images that were kept.
    """
    values = words.read(settings, conf, method)
    from pfedmoap_flwr.cli.data import prepare_features

    prepare_features(values, Console())


def _stop(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
