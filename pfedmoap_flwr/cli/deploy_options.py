"""What can be typed after `pfedmoap deploy`; the work is imported when it runs."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pfedmoap_flwr.cli import words
from pfedmoap_flwr.cli.options import SETTINGS, Conf, Method, Retry, Words

app = typer.Typer(
    rich_markup_mode=None,
    help="Deployment: rehearse it here, run on it, check a node. docs/deploy.md.",
)

ServerFolder = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="The server's folder of a kit.")
]


@app.command("local", epilog=SETTINGS)
def deploy_local(
    settings: Words = None,
    conf: Conf = None,
    method: Method = None,
    nodes: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=2, help="SuperNodes to start; default 2.", show_default=False
        ),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(metavar="FOLDER", help="Images of a node's own; repeat it for each node."),
    ] = None,
    retry: Retry = 0,
) -> None:
    """Rehearse a deployment on this machine: TLS, node keys, real processes, one small run.

    Everything is taken down afterwards, after Ctrl-C too; the run's folder stays.
    """
    values = words.read(settings, conf, method)
    from pfedmoap_flwr.cli.deploy import deploy_here

    folders = data or []
    deploy_here(values, nodes or len(folders) or 2, folders, retry, Console())


@app.command("run", epilog=SETTINGS)
def deploy_run(
    folder: ServerFolder,
    settings: Words = None,
    conf: Conf = None,
    method: Method = None,
    retry: Retry = 0,
) -> None:
    """Run on the deployed SuperLink of this machine; status 1 where the run failed.

    To be typed on the server, as the user of its SuperLink.
    """
    values = words.read(settings, conf, method)
    from pfedmoap_flwr.cli.deploy import run_deployed

    run_deployed(folder, values, retry, Console())


@app.command("forget")
def deploy_forget(folder: ServerFolder) -> None:
    """Remove what clients uploaded in ended runs from Flower's database; `deploy run` does so."""
    from pfedmoap_flwr.cli.deploy import forget

    forget(folder, Console())


@app.command("check", epilog=SETTINGS)
def deploy_check(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The site's folder of a kit.")],
    settings: Words = None,
    conf: Conf = None,
    method: Method = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="The site's images, in place of DATA in site.env."),
    ] = None,
) -> None:
    """Say line by line what this node lacks before a run; status 1 where something is missing.

    KEY=VALUE are the settings of the run that it will take part in.
    """
    values = words.read(settings, conf, method)
    from pfedmoap_flwr.cli.deploy import check_node

    if not check_node(folder, values, data, Console()):
        raise typer.Exit(1)
