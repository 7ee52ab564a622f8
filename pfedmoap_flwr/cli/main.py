"""The command `pfedmoap`: run a method, compare several, look at data, check the machine.

PyTorch, Flower and datasets take seconds to import, so that functions import them which need them:
help and a wrong setting are there at once.
"""

import argparse
import json
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from rich.console import Console

from pfedmoap_flwr import config, methods
from pfedmoap_flwr.config import Settings
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.report import tables
from pfedmoap_flwr.report.figures import SUFFIXES
from pfedmoap_flwr.settings import Value, help_line

DEFAULT_RIVALS = "pfedmoap,promptfl,coop,zeroshot"
DEFAULT_FIGURE = "partition.png"
RUN_GOES_ON = "a run goes on with: pfedmoap run resume=ITS_FOLDER"
OF_METHODS = "settings that one method alone has, NAME.KEY: see its page in docs/methods"

Command = Callable[[argparse.Namespace, Console], None]


@dataclass(frozen=True)
class Plan:
    """A checked run: its settings, with the places filled in, and its folder."""

    settings: Settings
    run_dir: Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    0 done, 1 the run failed, 2 wrong use, 130 stopped.
    """
    options = _parse(arguments)
    console = Console()
    errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    signal.signal(signal.SIGTERM, _stop)
    try:
        options.words = _words(options)
        options.command(options, console)
    except UsageError as error:
        errors.print(f"pfedmoap: {error}")
        return 2
    except KeyboardInterrupt:
        errors.print(f"pfedmoap: stopped; {options.goes_on}")
        return 130
    except _run_failures() as error:
        errors.print(str(error).rstrip())
        errors.print("pfedmoap: the run failed")
        return 1
    return 0


def run(options: argparse.Namespace, console: Console) -> None:
    """pfedmoap run: one method, one seed."""
    plan = make_plan(options.words)
    console.print(f"results in {plan.run_dir}", highlight=False, soft_wrap=True)
    summary = execute(plan, console, in_process=options.in_process)
    tables.print_summary(summary, console)
    console.print(f"results in {plan.run_dir}", highlight=False, soft_wrap=True)


def compare(options: argparse.Namespace, console: Console) -> None:
    """pfedmoap compare: several methods over several seeds, all else equal, in this process."""
    words = options.words
    seeds = [config.parse_words([f"seed={seed}"])["seed"] for seed in options.seeds.split(",")]
    from pfedmoap_flwr.runs.folder import default_path

    single = default_path(Settings())
    root = single.with_name(f"{single.name[:15]}-compare")
    plans = {
        name: [
            make_plan({**words, "method": name, "seed": s, "run-dir": str(root / f"{name}-s{s}")})
            for s in seeds
        ]
        for name in options.methods.split(",")
    }
    summaries: dict[str, list[dict[str, Any]]] = {}
    for name, runs in plans.items():
        for plan in runs:
            console.print(f"{name}, seed {plan.settings.seed}", highlight=False)
            summaries.setdefault(name, []).append(execute(plan, console, in_process=True))
    (root / "comparison.json").write_text(json.dumps(summaries, indent=2))
    tables.print_comparison(summaries, console)
    console.print(f"results in {root}", highlight=False, soft_wrap=True)


def show(options: argparse.Namespace, console: Console) -> None:
    """pfedmoap data show: who holds which images under the settings; no image is decoded."""
    from pfedmoap_flwr.cli import data

    data.show(options, console)


def prepare(options: argparse.Namespace, console: Console) -> None:
    """pfedmoap data prepare: get a data set and weights, compute all features a run will read."""
    from pfedmoap_flwr.cli import data

    data.prepare(options, console)


def list_sets(options: argparse.Namespace, console: Console) -> None:
    """pfedmoap data list: the data sets that have a name, and which are on this machine."""
    from pfedmoap_flwr.cli import data

    data.list_sets(options, console)


def doctor(options: argparse.Namespace, console: Console) -> None:
    """pfedmoap doctor: whether a run with these settings can start on this machine, offline."""
    from pfedmoap_flwr.cli import doctor

    doctor.doctor(options, console)


def make_plan(words: dict[str, Value]) -> Plan:
    """Check everything that can be checked before a run starts. Raises UsageError."""
    settings = None if words.get("resume") else config.parse(words)

    from pfedmoap_flwr.clip.load import resolve_device
    from pfedmoap_flwr.clip.weights import find_weights
    from pfedmoap_flwr.data.images import load_images
    from pfedmoap_flwr.data.partition import partition
    from pfedmoap_flwr.runs.folder import check_same, check_unused, default_path, load_settings

    if settings is None:
        run_dir = Path(str(words["resume"])).resolve()
        before = load_settings(run_dir)
        settings = before.replace({**words, "resume": str(run_dir)})
        check_same(before, settings)
    else:
        run_dir = Path(settings.run_dir).resolve() if settings.run_dir else default_path(settings)
        check_unused(run_dir)
    places: dict[str, Value] = {
        "run-dir": str(run_dir),
        "state-dir": str(run_dir / "clients"),
        "min-nodes": settings.data.num_clients,
    }
    # The processes of a run start in other folders
    for key in ("data.path", "data.classnames"):
        named = str(settings.flat()[key])
        if named and Path(named).expanduser().exists():
            places[key] = str(Path(named).expanduser().resolve())
    partition(load_images(settings.data), settings.data, settings.seed)
    find_weights(settings.clip.model, settings.clip.pretrained)
    resolve_device(settings.device)
    return Plan(settings.replace(places), run_dir)


def execute(plan: Plan, console: Console, *, in_process: bool) -> dict[str, Any]:
    """Run a plan to its end and return its summary."""
    if in_process:
        from client_app import app as client_app
        from pfedmoap_flwr.engines.in_process import run_in_process
        from server_app import app as server_app

        # Flower's own lines off, ours on, each once
        logging.getLogger("flwr").propagate = False
        logging.getLogger("flwr").setLevel(logging.WARNING)
        logging.getLogger("flwr.pfedmoap").setLevel(logging.INFO)
        run_in_process(server_app, client_app, plan.settings.flat(), plan.settings.data.num_clients)
    else:
        from pfedmoap_flwr.engines.simulation import simulate

        simulate(plan.settings, plan.run_dir, console)
    summary: dict[str, Any] = json.loads((plan.run_dir / "summary.json").read_text())
    return summary


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """argparse gives up on settings that follow an option; they are settings all the same."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if unknown := [word for word in rest if word.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    options.settings += rest
    # `--figure KEY=VALUE`: argparse takes the setting for the file
    if "=" in (options.figure or "") and Path(options.figure).suffix not in SUFFIXES:
        options.settings.append(options.figure)
        options.figure = DEFAULT_FIGURE
    return options


def _words(options: argparse.Namespace) -> dict[str, Value]:
    """Return what the command line sets: a file, KEY=VALUE words over it, --method over both."""
    words = config.parse_file(Path(options.conf)) if options.conf else {}
    words |= config.parse_words(options.settings)
    return {**words, "method": options.method} if options.method else words


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pfedmoap", description=__doc__)
    parser.set_defaults(conf=None, method=None, figure=None, settings=[], goes_on=RUN_GOES_ON)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    runs = _add(commands, "run", run, "run one method")
    runs.add_argument("--in-process", action="store_true", help="without Ray, in this process")
    rivals = _add(commands, "compare", compare, "compare methods over seeds")
    rivals.add_argument("--methods", default=DEFAULT_RIVALS, help=f"default {DEFAULT_RIVALS}")
    rivals.add_argument("--seeds", default="0,1,2", help="default 0,1,2")
    sets = commands.add_parser("data", help="data sets: list, show, prepare")
    looks = sets.add_subparsers(required=True, metavar="COMMAND")
    listing = looks.add_parser(
        "list", help="data sets that have a name", description=list_sets.__doc__
    )
    listing.set_defaults(command=list_sets)
    shows = _add(looks, "show", show, "who holds which images")
    shows.add_argument(
        "--figure",
        nargs="?",
        const=DEFAULT_FIGURE,
        metavar="FILE",
        help=f"draw clients x classes, .png or .svg; alone: {DEFAULT_FIGURE}",
    )
    shows.add_argument("--json", action="store_true", help="print the manifest alone")
    prepares = _add(looks, "prepare", prepare, "get images and weights, compute features")
    checks = _add(commands, "doctor", doctor, "check this machine for a run")
    for command in (prepares, checks):
        command.set_defaults(goes_on="the same command goes on from there")
    for command in (runs, prepares, checks):
        command.add_argument("--method", metavar="NAME", help=f"{', '.join(methods.names())}")
    return parser


def _add(commands: Any, name: str, command: Command, help: str) -> argparse.ArgumentParser:
    """Add a command that takes settings."""
    known = config.known_fields(())
    keys = "\n".join(f"  {key:28} {help_line(field)}" for key, field in known.items())
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=command.__doc__,
        epilog=f"settings:\n{keys}\n\n{OF_METHODS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings, see below")
    parser.add_argument("--conf", metavar="FILE.toml", help="settings; KEY=VALUE goes over them")
    parser.set_defaults(command=command)
    return parser


def _run_failures() -> tuple[type[Exception], ...]:
    """Return the errors by which a run ends that has begun."""
    from pfedmoap_flwr.engines.simulation import RunFailed
    from pfedmoap_flwr.federation.strategy import AllClientsFailed

    return (AllClientsFailed, RunFailed)


def _stop(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
