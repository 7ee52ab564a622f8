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
from pfedmoap_flwr.cli import data_options, deploy_options, many, report_options, words
from pfedmoap_flwr.cli.options import SETTINGS, Conf, DryRun, Jobs, Method, Out, Retry, Slurm, Words
from pfedmoap_flwr.engines import Engine
from pfedmoap_flwr.errors import RunFailed, UsageError

STOPPED = 130
RIVALS = ",".join(methods.RIVALS)
SEEDS = "0,1,2"

GO_ON = "the same command goes on from there"
HOW_TO_GO_ON = {
    "run": "a run goes on with: pfedmoap run resume=ITS_FOLDER",
    "compare": "a run goes on with: pfedmoap run resume=ITS_FOLDER",
    "tune": "the same command with --out goes on from there",
    "deploy local": "nothing of it runs on; a run goes on with resume=ITS_FOLDER and the same "
    "--nodes",
    "deploy run": "the run goes on; its folder's flwr.sh lists it, and ends it with: stop ID",
}

app = typer.Typer(rich_markup_mode=None)
app.command()(report_options.report)
app.add_typer(data_options.app, name="data")
app.add_typer(deploy_options.app, name="deploy")
app.add_typer(many.app)


Client = Annotated[
    int | None, typer.Option(metavar="NUMBER", help="Whose personal model.", show_default=False)
]
Weights = Annotated[
    str, typer.Option(metavar="FILE", help="CLIP's checkpoint, where a file's lies elsewhere.")
]
Best = Annotated[
    bool, typer.Option("--best", help="As in the best validated round, kept by eval.keep-best.")
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    0 done, 1 the run failed, 2 wrong use, 130 stopped.
    """
    typed = list(sys.argv[1:] if arguments is None else arguments)
    errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    for end in (signal.SIGTERM, signal.SIGHUP):
        # nohup has a closed terminal ignored, which is to stay so
        if signal.getsignal(end) != signal.SIG_IGN:
            signal.signal(end, _stop)
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
        said = (HOW_TO_GO_ON.get(" ".join(typed[:count])) for count in (2, 1))
        errors.print(f"pfedmoap: stopped; {next(filter(None, said), GO_ON)}")
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
    retry: Retry = 0,
) -> None:
    """Run one method with one seed."""
    values = words.read(settings, conf, method)
    from pfedmoap_flwr.cli.run import run_one

    run_one(values, engine, retry, Console())


@app.command(epilog=SETTINGS)
def compare(
    settings: Words = None,
    conf: Conf = None,
    names: Annotated[
        str,
        typer.Option(
            "--methods",
            metavar="NAME,...|all",
            help=f"Names, or files of yours. Default {RIVALS}.",
            show_default=False,
        ),
    ] = RIVALS,
    seeds: Annotated[
        str,
        typer.Option(
            metavar="SEED,...", help=f"Default {SEEDS}; 0-4 is a range.", show_default=False
        ),
    ] = SEEDS,
    sweep: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE,...", help="Values of a setting to compare; repeatable."),
    ] = None,
    out: Out = "",
    jobs: Jobs = 1,
    ray_address: Annotated[
        str, typer.Option(metavar="ADDRESS", help="A Ray cluster that is up: auto, or HOST:PORT.")
    ] = "",
    slurm: Slurm = "",
    tuned: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="What `pfedmoap tune` chose for each method."),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Run several methods over several seeds, all else equal. Stopped, it goes on with --out."""
    chosen = words.read_methods(names)  # first of all: a file brings settings of its own
    values = words.read(settings, conf)
    numbers, sweeps = words.read_seeds(seeds), words.read_sweeps(sweep or [])
    from pfedmoap_flwr.cli.compare import How, compare_all
    from pfedmoap_flwr.comparison.slurm import read_options
    from pfedmoap_flwr.comparison.tuning import read_tuned

    found = read_tuned(tuned, chosen) if tuned else {}
    how = How(out, jobs, ray_address, dry_run, read_options(slurm), found)
    compare_all(chosen, numbers, sweeps, values, how, Console())


@app.command(epilog=SETTINGS)
def doctor(settings: Words = None, conf: Conf = None, method: Method = None) -> None:
    """Say what this machine has, and whether such a run can start here without network.

    The hub is not asked. HF_HUB_OFFLINE=1 keeps a run from asking it too.
    """
    values = words.read(settings, conf, method)
    from pfedmoap_flwr.cli.doctor import examine

    examine(values, Console())


@app.command()
def predict(
    model: Annotated[
        Path, typer.Argument(metavar="PLACE", help="A run's folder, a node's, or a model's file.")
    ],
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", help="Images, or folders of them.")
    ],
    client: Client = None,
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write every class's probability there.")
    ] = None,
    weights: Weights = "",
    best: Best = False,
) -> None:
    """Classify images with a client's personal model, just as the run measured it."""
    from pfedmoap_flwr.cli.predict import predict_images

    predict_images(model, images, client, csv, weights, Console(), best=best)


@app.command()
def export(
    model: Annotated[
        Path, typer.Argument(metavar="PLACE", help="A run's folder, or a node's state folder.")
    ],
    file: Annotated[Path, typer.Argument(metavar="FILE.safetensors", help="A new file.")],
    client: Client = None,
    best: Best = False,
) -> None:
    """Write a client's personal model into one file that says what it is."""
    from pfedmoap_flwr.cli.predict import export_model

    export_model(model, file, client, Console(), best=best)


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
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    client: Annotated[
        list[int] | None, typer.Option(metavar="NUMBER", help="Of these clients, more closely.")
    ] = None,
    figure: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw what can be drawn, .png or .svg.")
    ] = None,
    projection: Annotated[
        str, typer.Option(metavar="pca|t-sne", help="How text features come into a plane.")
    ] = "pca",
    best: Best = False,
) -> None:
    """Show what was learned: whom gates listen to, distances in the pool, words near a prompt."""
    from pfedmoap_flwr.cli.inspect import print_inside

    print_inside(run, client or [], figure, projection, Console(), best=best)


@app.command("health")
def say_health(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    max_age: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Late when no round ended for so long.")
    ] = None,
) -> None:
    """Say in one line how a run is doing; the exit code is 1 where somebody should look."""
    from pfedmoap_flwr.cli.health import print_health

    raise typer.Exit(print_health(run, max_age))


@app.command("methods", epilog=SETTINGS)
def list_methods(settings: Words = None, conf: Conf = None) -> None:
    """List all methods: what travels, what stays, what is read, fidelity, source."""
    values = words.read(settings, conf)
    from pfedmoap_flwr.cli.methods import print_methods

    print_methods(values, Console())


@app.command("check-method")
def check_method(
    file: Annotated[str, typer.Argument(metavar="NAME|FILE.py", help="A method, or its file.")],
) -> None:
    """Check that the laws of docs/laws.md hold for a method; status 1 where one does not."""
    from pfedmoap_flwr.cli.laws import check_laws

    if not check_laws(methods.named(file), Console()):
        raise typer.Exit(1)


@app.command("site-kit")
def site_kit(
    sites: Annotated[
        str, typer.Option(metavar="NAME,...", help="Its sites; their order numbers the clients.")
    ],
    server: Annotated[
        str,
        typer.Option(metavar="HOST", help="The name or address at which nodes call the server."),
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="A new folder for all of it.")],
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="The server's port that is open to the network.")
    ] = 8443,
    ca: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="An earlier kit's ca, to renew or to add sites."),
    ] = None,
    place: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where each folder will lie on its host.")
    ] = Path("/etc/pfedmoap"),
) -> None:
    """Make what a deployment needs: a CA, a folder for the server, and one for each site."""
    from pfedmoap_flwr.cli.site_kit import make_kit

    make_kit(out, sites, server, port, ca, place, Console())


def _stop(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
