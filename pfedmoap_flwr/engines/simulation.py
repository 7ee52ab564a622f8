"""`flwr run` in simulation, with its traps fixed.

Flower's own local SuperLink outlives the command, keeps its first caller's environment, installs
the app's dependencies for every run and lets `flwr run` return 0 for a failed run. Here every run
has a SuperLink of its own, on a free port, in a temporary Flower home, ended with the command.
"""

import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.status import Status

from pfedmoap_flwr import config, files
from pfedmoap_flwr.config import Settings
from pfedmoap_flwr.engines.tasks import ray_environment
from pfedmoap_flwr.engines.watchdog import family
from pfedmoap_flwr.errors import RunFailed, UsageError
from pfedmoap_flwr.runs.folder import RunFolder
from pfedmoap_flwr.runs.place import held, make_folder
from pfedmoap_flwr.settings import flatten

CONNECTION = "pfedmoap"
START_SECONDS = 60.0
POLL_SECONDS = 0.5
STATUS_SECONDS = 20.0
LOG = "flower.log"
Ask = Callable[[Sequence[str]], dict[str, Any]]
"""Runs a flwr command against one SuperLink and returns the JSON that it prints."""


def simulate(settings: Settings, run_dir: Path, console: Console) -> None:
    """Run a simulation in Ray through `flwr run` and wait for its end, printing each round.

    Raises RunFailed with the server's own reason, or with the end of the log where it left none.
    """
    app_folder()  # first of all: there must be one
    make_folder("run-dir", run_dir)
    gpus = round(1 / (os.cpu_count() or 1), 4) if torch.cuda.is_available() else 0.0
    federation = (
        f"num-supernodes={settings.data.num_clients} client-resources-num-cpus=1 "
        f"client-resources-num-gpus={gpus}"
    )
    log = run_dir / LOG
    with console.status("starting Flower and Ray ...") as live, _superlink(run_dir) as ask:
        run_through(ask, settings, run_dir, live, log, "--federation-config", federation)


def run_through(
    ask: Ask, settings: Settings, run_dir: Path, live: Status, log: Path | None, *words: str
) -> None:
    """Submit a run with `flwr run`, show its rounds as they come, and wait for its end.

    run_dir: where the server writes, on this machine. log: the server's, if there is one.
    words: more of the command line.

    Raises UsageError where another run is at work in the folder, and RunFailed with the server's
    own reason, or with the end of the log where it left none.
    """
    with held(run_dir):
        before = _endings(run_dir)
    run_config = run_dir / "run-config.toml"
    files.replace(run_config, config.toml(settings.flat()))
    with _app_that_knows(settings) as app:
        command = ["run", str(app), CONNECTION, "--format", "json"]
        started = ask([*command, "--run-config", str(run_config), *words])
    status = follow(str(started["run-id"]), ask, run_dir, settings, live, before)
    if status == "finished:completed":
        return
    if "error.txt" in dict(_endings(run_dir) - before):
        raise RunFailed((run_dir / "error.txt").read_text())
    lines = log.read_text(errors="replace").splitlines()[-30:] if log else []
    raise RunFailed(
        "\n".join([*lines, f"Flower lists the run as {status}" + (f"; log: {log}" if log else "")])
    )


def app_folder() -> Path:
    """Return the folder of the Flower app. Raises UsageError where the package lies alone."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / "pyproject.toml").is_file() or not (folder / "server_app.py").is_file():
        raise UsageError(
            f"no Flower app in {folder}: flwr run needs a clone of the repository "
            "(pip install -e .); or use the engine in-process"
        )
    return folder


@contextmanager
def _app_that_knows(settings: Settings) -> Iterator[Path]:
    """Yield the app's folder: a copy where a method from outside has settings.

    Flower takes no setting that the app's pyproject.toml does not name.
    """
    app = app_folder()
    project = tomllib.loads((app / "pyproject.toml").read_text())
    if settings.flat().keys() <= flatten(project["tool"]["flwr"]["app"]["config"]).keys():
        yield app
        return
    with tempfile.TemporaryDirectory(prefix="pfedmoap-app-") as copy:
        for name in ("pyproject.toml", "server_app.py", "client_app.py", "LICENSE", "README.md"):
            shutil.copy(app / name, copy)
        package = Path(__file__).resolve().parents[1]
        # Flower leaves binary files out of a bundle in any case
        left_out = shutil.ignore_patterns("*.pyc", "*.safetensors", "*.parquet")
        shutil.copytree(package, Path(copy, package.name), ignore=left_out)
        config.write_pyproject(Path(copy, "pyproject.toml"))
        yield Path(copy)


def flower_environment() -> dict[str, str]:
    """Return this process's environment; Flower and Ray do not call home unless it says so."""
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", **ray_environment()}
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**quiet, **os.environ, "PATH": programs}


@contextmanager
def _superlink(run_dir: Path) -> Iterator[Ask]:
    """Start a SuperLink and yield what asks it."""
    port, log = free_port(), run_dir / LOG
    with family("pfedmoap-flwr-", flower_environment(), log) as started:
        started.environment["FLWR_HOME"] = str(started.home)
        (started.home / "config.toml").write_text(
            f'[superlink]\ndefault = "{CONNECTION}"\n\n'
            f'[superlink.{CONNECTION}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        )
        command = ["flower-superlink", "--insecure", "--simulation", "--host", "127.0.0.1"]
        command += ["--port", str(port), "--control-api-address", f"127.0.0.1:{free_port()}"]
        command += ["--isolation", "subprocess", "--disable-runtime-dependency-installation"]
        wait_for_port(port, started.start(command, log), run_dir)
        yield functools.partial(flwr, environment=started.environment)


def follow(
    run_id: str,
    ask: Ask,
    run_dir: Path,
    settings: Settings,
    live: Status,
    before: Set[tuple[str, int]],
) -> str:
    """Show rounds as they are written until the run is finished; return Flower's status of it."""
    folder = RunFolder(run_dir)
    read = _written(run_dir / "rounds.jsonl")  # before the rounds: what is added meanwhile is seen
    rounds = folder.rounds()
    shown = len(rounds)
    asked = time.monotonic()
    while True:
        # Twice a second: a long run's rounds are not read again while none is added
        if (written := _written(run_dir / "rounds.jsonl")) != read:
            rounds, read = folder.rounds(), written
        # A resumed run drops what was written after its checkpoint
        shown = min(shown, len(rounds))
        for record in rounds[shown:]:
            live.console.print(record.line(settings.num_server_rounds), highlight=False)
            live.update(f"round {record.round + 1}/{settings.num_server_rounds} ...")
            shown += 1
        if _endings(run_dir) - before or time.monotonic() - asked > STATUS_SECONDS:
            listed = ask(["list", "--run-id", run_id, "--format", "json"])
            status = str(listed["runs"][0]["status"])
            if status.startswith("finished"):
                return status
            asked = time.monotonic()
        time.sleep(POLL_SECONDS)


def flwr(
    words: Sequence[str], environment: Mapping[str, str], program: str = "flwr"
) -> dict[str, Any]:
    """Run a flwr command that prints JSON. Raises RunFailed with what it said instead."""
    done = subprocess.run(
        [program, *words], env=environment, capture_output=True, text=True, check=False
    )
    try:
        said = dict(json.loads(done.stdout))
    except ValueError:
        raise RunFailed(f"flwr {words[0]}: {(done.stderr or done.stdout).strip()}") from None
    if not said.get("success", True):
        raise RunFailed(f"flwr {words[0]}: {said.get('error-message', said)}")
    return said


def free_port() -> int:
    """Return a port of this machine on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_port(port: int, process: subprocess.Popen[bytes], run_dir: Path) -> None:
    """Wait until a SuperLink listens. Raises RunFailed that names its log where it does not."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(POLL_SECONDS / 5)
    raise RunFailed(f"flower-superlink did not start; its log: {run_dir / LOG}")


def _written(path: Path) -> tuple[int, int] | None:
    """Return when a file was written and its size, which tell its contents apart; None: no file."""
    if not path.exists():
        return None
    said = path.stat()
    return said.st_mtime_ns, said.st_size


def _endings(run_dir: Path) -> set[tuple[str, int]]:
    """Return what says how a run in this folder ended, and when that was written.

    A run that is resumed leaves the ending of before until it has read everything.
    """
    paths = (run_dir / "summary.json", run_dir / "error.txt")
    return {(path.name, path.stat().st_mtime_ns) for path in paths if path.exists()}
