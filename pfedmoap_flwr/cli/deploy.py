"""pfedmoap deploy: a rehearsal on this machine, runs on a deployment, and what a node lacks."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from pfedmoap_flwr import api, methods
from pfedmoap_flwr.cli.say import say
from pfedmoap_flwr.deploy.check import examine
from pfedmoap_flwr.deploy.forget import forget_messages
from pfedmoap_flwr.deploy.local import plan_rehearsal, rehearse
from pfedmoap_flwr.deploy.submit import PAUSE_SECONDS, Server, plan_deployed
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.report import tables
from pfedmoap_flwr.settings import Value


def deploy_here(
    values: Mapping[str, Value],
    nodes: int,
    images: Sequence[Path],
    retries: int,
    console: Console,
) -> None:
    """Deploy, run, take down, and print the closing table and where the results are.

    Raises UsageError for a method that is a file.
    """
    _check_method(values)
    plan = plan_rehearsal(values, nodes, images)
    attempt = functools.partial(rehearse, images=images, console=console)
    result = api.persist(plan, attempt, retries, console)
    tables.print_summary(result.summary, console)
    console.print("ended         SuperLink and SuperNodes; their keys are deleted", highlight=False)
    say(console, f"results in {result.folder}")


def run_deployed(folder: Path, values: Mapping[str, Value], retries: int, console: Console) -> None:
    """Run on the deployed SuperLink, and print the closing table and where the results are.

    Raises UsageError for a method that is a file.
    """
    _check_method(values)
    server = Server(folder.resolve())
    _ = server.database
    plan = plan_deployed(values)
    say(console, f"results in {plan.run_dir}")
    attempt = functools.partial(server.run, console=console)
    result = api.persist(plan, attempt, retries, console, PAUSE_SECONDS)
    tables.print_summary(result.summary, console)
    say(console, f"results in {result.folder}")


def forget(folder: Path, console: Console) -> None:
    """Remove what ended runs left in Flower's database."""
    database = Server(folder.resolve()).database
    forget_messages(database)
    say(console, f"no message of an ended run is in {database}")


def check_node(
    folder: Path, values: Mapping[str, Value], data: Path | None, console: Console
) -> bool:
    """Print each finding; return whether nothing is missing.

    Raises UsageError for a method that is a file.
    """
    _check_method(values)
    missing = []
    for finding in examine(folder, values, str(data.absolute()) if data else None):
        state = "ok" if finding.good else "MISSING"
        line = f"{state:8} {finding.what:12} {finding.said}"
        say(console, line)
        missing += [] if finding.good else [finding.what]
    verdict = f"missing: {', '.join(missing)}" if missing else "this node can take part"
    say(console, f"{'verdict':21} {verdict}")
    return not missing


def _check_method(values: Mapping[str, Value]) -> None:
    """Raise UsageError for a method that real nodes would not know."""
    if path := methods.outside.files().get(str(values.get("method", ""))):
        raise UsageError(
            f"method file {path}: nodes run no file; install the method on each as a wheel with an "
            f"entry point of the group {methods.outside.GROUP} (docs/development.md)"
        )
