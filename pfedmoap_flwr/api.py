"""What the commands do, for Python: run one method, or compare several."""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from pfedmoap_flwr import config, files
from pfedmoap_flwr.clip.load import resolve_device
from pfedmoap_flwr.clip.weights import find_weights
from pfedmoap_flwr.config import Settings
from pfedmoap_flwr.data.federated import federated
from pfedmoap_flwr.engines import Engine
from pfedmoap_flwr.engines.in_process import run_in_process
from pfedmoap_flwr.engines.simulation import simulate
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods import RIVALS
from pfedmoap_flwr.runs.folder import (
    RunFolder,
    check_same,
    check_unused,
    default_path,
    load_settings,
)
from pfedmoap_flwr.runs.record import Round
from pfedmoap_flwr.settings import Value, flatten, key_of


@dataclass(frozen=True)
class Plan:
    """A checked run: its settings, with the places filled in, and its folder."""

    settings: Settings
    run_dir: Path


@dataclass(frozen=True)
class RunResult:
    """What a run left in its folder.

    folder: all of it, as docs/settings.md lists.
    summary: summary.json, the means over clients after the last round.
    rounds: a record of each round, the first of them before any training.
    clients: the lines of clients.csv; None where a client has no such number.
    """

    folder: Path
    summary: dict[str, Any]
    rounds: list[Round]
    clients: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> "RunResult":
        """Read the folder of a run that has ended. Raises FileNotFoundError for another one."""
        run = RunFolder(folder)
        return cls(folder, run.summary(), run.rounds(), run.clients())


def run(
    *,
    engine: Engine = "in-process",
    conf: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> RunResult:
    """Run one method with one seed, and return what it left.

    engine: "in-process", or "ray" to compute as `flwr run` does.
    conf: a TOML file of settings; those given by name go over it.
    settings: as `pfedmoap settings` lists them, with "_" for "-"; a group is a dict. resume=FOLDER
        goes on where an earlier run stopped.

    Raises UsageError for a wrong setting, before anything is computed, and RunFailed for a run
    that could not go on.

    >>> import pfedmoap_flwr as pf
    >>> result = pf.run(method="promptfl", seed=1, num_server_rounds=1, data={"num_clients": 4})
    >>> result.summary["method"], result.summary["seed"], len(result.clients)
    ('promptfl', 1, 4)
    >>> [record.round for record in result.rounds]
    [0, 1]
    >>> sorted(path.name for path in result.folder.glob("*.csv"))
    ['clients.csv']
    """
    return execute(plan(to_flat(settings, conf)), engine)


def compare(
    methods: Sequence[str] = RIVALS,
    seeds: Sequence[int] = (0, 1, 2),
    *,
    conf: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> dict[str, list[RunResult]]:
    """Run methods over seeds, all else equal; return each method's results in the order of seeds.

    All are checked before the first one starts. Settings and errors are those of `run`.

    >>> import pfedmoap_flwr as pf
    >>> results = pf.compare(["coop", "zeroshot"], [0], num_server_rounds=1, local_epochs=1)
    >>> {name: [result.summary["bytes_up"] for result in runs] for name, runs in results.items()}
    {'coop': [0], 'zeroshot': [0]}
    """
    return execute_all(plan_all(methods, seeds, to_flat(settings, conf)))


def to_flat(
    settings: Mapping[str, Any], conf: str | os.PathLike[str] | None = None
) -> dict[str, Value]:
    """Return Python's settings as flat ones: {"data": {"num_clients": 4}} as data.num-clients.

    A file's settings lie below them. Raises UsageError where the file is none or wrong.

    >>> to_flat({"local_epochs": 1, "data": {"num_clients": 4}, "pfedmoap": {"lambda_": 0.1}})
    {'local-epochs': 1, 'data.num-clients': 4, 'pfedmoap.lambda': 0.1}
    """
    values = config.parse_file(Path(conf)) if conf is not None else {}
    given = {".".join(map(key_of, k.split("."))): v for k, v in flatten(settings).items()}
    paths = {key: os.fspath(v) for key, v in given.items() if isinstance(v, os.PathLike)}
    return {**values, **given, **paths}


def plan(values: Mapping[str, Value]) -> Plan:
    """Check everything that can be checked before a run starts. Raises UsageError."""
    if resume := str(values.get("resume", "")):
        run_dir = Path(resume).resolve()
        before = load_settings(run_dir)
        settings = before.replace({**values, "resume": str(run_dir)})
        check_same(before, settings)
    else:
        settings = config.parse(values)
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
    settings = settings.replace(places)
    find_weights(settings.clip.model, settings.clip.pretrained)
    resolve_device(settings.device)
    federated(settings.data, settings.seed)
    return Plan(settings, run_dir)


def execute(plan: Plan, engine: Engine = "in-process", console: Console | None = None) -> RunResult:
    """Run a plan to its end. Raises RunFailed, and UsageError where only the run could tell."""
    if engine not in get_args(Engine):
        raise UsageError(f"engine={engine!r}: must be one of {', '.join(get_args(Engine))}")
    if engine == "ray":
        simulate(plan.settings, plan.run_dir, console or Console())
    else:
        # Flower's own lines off, ours on, each once
        logging.getLogger("flwr").propagate = False
        logging.getLogger("flwr").setLevel(logging.WARNING)
        logging.getLogger("flwr.pfedmoap").setLevel(logging.INFO)
        run_in_process(plan.settings)
    return RunResult.read(plan.run_dir)


def plan_all(
    methods: Sequence[str], seeds: Sequence[int], values: Mapping[str, Value]
) -> list[Plan]:
    """Check all runs of a comparison, which get a folder in common. Raises UsageError."""
    single = default_path(Settings())
    root = single.with_name(f"{single.name[:15]}-compare")
    return [
        plan({**values, "method": name, "seed": seed, "run-dir": str(root / f"{name}-s{seed}")})
        for name in methods
        for seed in seeds
    ]


def execute_all(
    plans: Sequence[Plan], console: Console | None = None
) -> dict[str, list[RunResult]]:
    """Run the plans of a comparison in this process; comparison.json beside them sums up."""
    results: dict[str, list[RunResult]] = {}
    for each in plans:
        name, seed = each.settings.method, each.settings.seed
        if console:
            console.print(f"{name}, seed {seed}", highlight=False)
        results.setdefault(name, []).append(execute(each))
    summaries = {name: [result.summary for result in runs] for name, runs in results.items()}
    files.replace(plans[0].run_dir.parent / "comparison.json", json.dumps(summaries, indent=2))
    return results
