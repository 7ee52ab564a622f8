"""What `pfedmoap run` does, for Python."""

import functools
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from rich.console import Console

from pfedmoap_flwr import config, files, logs, methods
from pfedmoap_flwr.clip.load import resolve_device
from pfedmoap_flwr.clip.weights import get_weights
from pfedmoap_flwr.config import Settings
from pfedmoap_flwr.data.federated import federated
from pfedmoap_flwr.engines import Engine
from pfedmoap_flwr.engines.in_process import run_in_process
from pfedmoap_flwr.engines.simulation import simulate
from pfedmoap_flwr.errors import RunFailed, UsageError, last_line
from pfedmoap_flwr.runs import checkpoint
from pfedmoap_flwr.runs.find_model import RunModels
from pfedmoap_flwr.runs.folder import RunFolder, check_unused, load_settings
from pfedmoap_flwr.runs.model import Model
from pfedmoap_flwr.runs.place import folder_named, held, new_folder
from pfedmoap_flwr.settings import Value, flatten, key_of

if TYPE_CHECKING:
    import pandas as pd

DEPLOYED = ("state-dir", "min-nodes")
"""Settings that a run on this machine fills in itself."""


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
    """

    folder: Path
    summary: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "RunResult":
        """Read the folder of a run that has ended. Raises FileNotFoundError for another one."""
        return cls(folder, RunFolder(folder).summary())

    @functools.cached_property
    def rounds(self) -> "pd.DataFrame":
        """A row per round, the first of them before any training; see `runs.frames`."""
        from pfedmoap_flwr.runs.frames import rounds_frame

        return rounds_frame(RunFolder(self.folder).rounds())

    @functools.cached_property
    def clients(self) -> "pd.DataFrame":
        """A row per client, what clients.csv says; NaN where a client has no such number."""
        from pfedmoap_flwr.runs.frames import clients_frame

        return clients_frame(RunFolder(self.folder).clients())

    def client(self, number: int, *, best: bool = False) -> Model:
        """Return a client's personal model, as the last round measured it.

        best: as the best validated round did, kept by eval.keep-best.

        Raises UsageError where there is none, or its head is on another machine.
        """
        models = self._best_models if best else self._models
        if number not in models.clients:
            raise UsageError(f"{self.folder}: clients are 0 to {models.clients[-1]}")
        return models.of(number)

    @functools.cached_property
    def _models(self) -> RunModels:
        return RunModels(self.folder)

    @functools.cached_property
    def _best_models(self) -> RunModels:
        return RunModels(self.folder, best=True)


def load(folder: str | os.PathLike[str]) -> RunResult:
    """Return what an earlier run left. Raises UsageError where none has ended there."""
    path = Path(folder).expanduser().resolve()
    if not (path / "summary.json").is_file():
        raise UsageError(f"{path}: no summary.json there; give the folder of a run that has ended")
    return RunResult.read(path)


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

    Examples:
        >>> import pfedmoap_flwr as pf
        >>> result = pf.run(method="promptfl", seed=1, num_server_rounds=1, data={"num_clients": 4})
        >>> result.summary["method"], result.summary["seed"], len(result.clients)
        ('promptfl', 1, 4)
        >>> list(result.rounds.index)
        [0, 1]
        >>> sorted(path.name for path in result.folder.glob("*.csv"))
        ['clients.csv']
    """
    _check_engine(engine)
    return execute(plan(to_flat(settings, conf)), engine)


def to_flat(
    settings: Mapping[str, Any], conf: str | os.PathLike[str] | None = None
) -> dict[str, Value]:
    """Return Python's settings as flat ones: {"data": {"num_clients": 4}} as data.num-clients.

    A file's settings lie below them; method may be a Python file. Raises UsageError where a file is
    none or wrong.

    Examples:
        >>> to_flat({"local_epochs": 1, "data": {"num_clients": 4}, "pfedmoap": {"lambda_": 0.1}})
        {'local-epochs': 1, 'data.num-clients': 4, 'pfedmoap.lambda': 0.1}
    """
    if (method := settings.get("method")) and isinstance(method, str | os.PathLike):
        settings = {**settings, "method": methods.named(os.fspath(method))}
    values = config.parse_file(Path(conf)) if conf is not None else {}
    given = {".".join(map(key_of, k.split("."))): v for k, v in flatten(settings).items()}
    paths = {key: os.fspath(v) for key, v in given.items() if isinstance(v, os.PathLike)}
    return config.absolute({**values, **given, **paths})


def plan(values: Mapping[str, Value], *, own_images: bool = False) -> Plan:
    """Check everything that can be checked before a run starts. Raises UsageError.

    own_images: each client has a folder of its own, and the data set of the settings is not read.
    """
    for key in DEPLOYED:
        if key in values:
            raise UsageError(f"setting {key}: is for deployments; a run here decides it itself")
    settings, run_dir = settings_and_folder(values)
    if run_dir and not settings.resume:
        _check_place(run_dir)
    logs.set_up(settings.log_format)
    places: dict[str, Value] = {"min-nodes": settings.data.num_clients}
    settings = settings.replace(places)
    get_weights(settings.clip.model, settings.clip.pretrained)
    resolve_device(settings.device)
    if not own_images:
        federated(settings.data, settings.seed)
    # Made when all else is right: another run that begins in this second gets another one
    run_dir = run_dir or new_folder(settings)
    places = {"run-dir": str(run_dir), "state-dir": str(run_dir / "clients")}
    return Plan(settings.replace(places), run_dir)


def settings_and_folder(values: Mapping[str, Value]) -> tuple[Settings, Path | None]:
    """Return the settings of a new run or of the one to go on with, and its folder if one is named.

    Raises UsageError where the folder has another run, or the run cannot go on so.
    """
    if resume := str(values.get("resume", "")):
        run_dir = folder_named("resume", resume)
        return _continued(run_dir, values), run_dir
    settings = config.parse(values)
    if not settings.run_dir:
        return settings, None
    run_dir = folder_named("run-dir", settings.run_dir)
    check_unused(run_dir)
    return settings, run_dir


def _continued(run_dir: Path, values: Mapping[str, Value]) -> Settings:
    """Return the settings of the run to go on with, with what may change of them changed."""
    if values.get("run-dir"):
        raise UsageError("setting run-dir: a resumed run goes on in its own folder")
    settings = load_settings(run_dir).replace({**values, "resume": str(run_dir)})
    folder = RunFolder(run_dir)
    folder.reopen(settings)
    done = max((record.round for record in folder.rounds()), default=0)
    if settings.num_server_rounds < done:
        raise UsageError(
            f"setting num-server-rounds={settings.num_server_rounds}: the run to resume has done "
            f"{done} rounds already"
        )
    return settings


def _check_place(run_dir: Path) -> None:
    """Raise UsageError where no run folder can be made, before any data set is loaded."""
    there = files.nearest(run_dir)
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UsageError(f"setting run-dir={run_dir}: {there} is no folder that can be written")


def execute(plan: Plan, engine: Engine = "in-process", console: Console | None = None) -> RunResult:
    """Run a plan to its end. Raises RunFailed, and UsageError where only the run could tell."""
    _check_engine(engine)
    if engine == "ray":
        simulate(plan.settings, plan.run_dir, console or Console())
    else:
        # Flower's own lines off, ours on, each once
        logging.getLogger("flwr").propagate = False
        logging.getLogger("flwr").setLevel(logging.WARNING)
        logging.getLogger("flwr.pfedmoap").setLevel(logging.INFO)
        run_in_process(plan.settings)
    return RunResult.read(plan.run_dir)


def persist(
    plan: Plan,
    attempt: Callable[[Plan], RunResult],
    retries: int,
    console: Console,
    pause: float = 0.0,
) -> RunResult:
    """Attempt a plan; where it fails, go on from its last whole round, so many times.

    pause: seconds before each. Raises RunFailed of the last attempt.
    """
    for left in range(retries, -1, -1):
        try:
            return attempt(plan)
        except RunFailed as error:
            if not left:
                raise
            console.print(f"the run failed: {last_line(error)}", markup=False, highlight=False)
            time.sleep(pause)
            plan = _again(plan)
            console.print(
                f"it goes on from its last whole round; attempts left after this one: {left - 1}",
                highlight=False,
            )
    raise AssertionError("not reached")


def _again(plan: Plan) -> Plan:
    """Return what is left of a plan that failed; without a whole round it begins anew."""
    # The server of a run may outlive what submitted it
    with held(plan.run_dir, wait=plan.settings.node_timeout):
        pass
    if checkpoint.is_there(plan.run_dir):
        return Plan(plan.settings.replace({"resume": str(plan.run_dir)}), plan.run_dir)
    RunFolder(plan.run_dir).forget_beginning()
    return plan


def _check_engine(engine: str) -> None:
    if engine not in get_args(Engine):
        raise UsageError(f"engine={engine!r}: must be one of {', '.join(get_args(Engine))}")
