"""`flwr run` in simulation, with its traps fixed.

Flower's own local SuperLink outlives the command, keeps its first caller's environment, installs
the app's dependencies for every run and lets `flwr run` return 0 for a failed run. Here every run
has a SuperLink of its own, on a free port, in a temporary Flower home, ended with the command.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.status import Status

from pfedmoap_flwr import config, files
from pfedmoap_flwr.config import Settings
from pfedmoap_flwr.errors import RunFailed, UsageError
from pfedmoap_flwr.runs.folder import RunFolder

CONNECTION = "pfedmoap"
START_SECONDS = 60.0
POLL_SECONDS = 0.5
STATUS_SECONDS = 20.0
LOG = "flower.log"


def simulate(settings: Settings, run_dir: Path, console: Console) -> None:
    """Run a simulation in Ray through `flwr run` and wait for its end, printing each round.

    Raises RunFailed with the server's own reason, or with the end of the log where it left none.
    """
    app = app_folder()
    run_dir.mkdir(parents=True, exist_ok=True)
    RunFolder(run_dir).forget_ending()
    run_config = run_dir / "run-config.toml"
    files.replace(run_config, config.toml(settings.flat()))
    gpus = round(1 / (os.cpu_count() or 1), 4) if torch.cuda.is_available() else 0.0
    federation = (
        f"num-supernodes={settings.data.num_clients} client-resources-num-cpus=1 "
        f"client-resources-num-gpus={gpus}"
    )
    with console.status("starting Flower and Ray ...") as live, _superlink(run_dir) as environment:
        words = ["run", str(app), CONNECTION, "--format", "json", "--run-config", str(run_config)]
        started = _flwr([*words, "--federation-config", federation], environment)
        if not started.get("success"):
            raise RunFailed(f"flwr run did not start: {started.get('error-message', started)}")
        status = _follow(str(started["run-id"]), environment, run_dir, settings, live)
    if status == "finished:completed":
        return
    if (run_dir / "error.txt").exists():
        raise RunFailed((run_dir / "error.txt").read_text())
    log = (run_dir / LOG).read_text(errors="replace").splitlines()[-30:]
    raise RunFailed("\n".join([*log, f"Flower lists the run as {status}; log: {run_dir / LOG}"]))


def app_folder() -> Path:
    """Return the folder of the Flower app. Raises UsageError where the package lies alone."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / "pyproject.toml").is_file() or not (folder / "server_app.py").is_file():
        raise UsageError(
            f"no Flower app in {folder}: flwr run needs a clone of the repository "
            "(pip install -e .); or use the engine in-process"
        )
    return folder


def flower_environment() -> dict[str, str]:
    """Return this process's environment with Flower's and Ray's calls home off by default."""
    quiet = {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**quiet, **os.environ, "PATH": programs}


@contextmanager
def _superlink(run_dir: Path) -> Iterator[dict[str, str]]:
    """Start a SuperLink and yield the environment in which `flwr` finds it."""
    with tempfile.TemporaryDirectory(prefix="pfedmoap-flwr-", ignore_cleanup_errors=True) as home:
        port = free_port()
        (Path(home) / "config.toml").write_text(
            f'[superlink]\ndefault = "{CONNECTION}"\n\n'
            f'[superlink.{CONNECTION}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        )
        environment = {**flower_environment(), "FLWR_HOME": home}
        command = ["flower-superlink", "--insecure", "--simulation", "--host", "127.0.0.1"]
        command += ["--port", str(port), "--control-api-address", f"127.0.0.1:{free_port()}"]
        command += ["--isolation", "subprocess", "--disable-runtime-dependency-installation"]
        with (run_dir / LOG).open("ab") as log:
            # A session of its own: Ctrl-C reaches this command alone, which then ends the rest
            process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        try:
            _wait_for_port(port, process, run_dir)
            yield environment
        finally:
            _end(process)


def _follow(
    run_id: str, environment: dict[str, str], run_dir: Path, settings: Settings, live: Status
) -> str:
    """Show rounds as they are written until the run is finished; return Flower's status of it."""
    folder = RunFolder(run_dir)
    shown = len(folder.rounds())
    asked = time.monotonic()
    while True:
        for record in folder.rounds()[shown:]:
            live.console.print(record.line(settings.num_server_rounds), highlight=False)
            live.update(f"round {record.round + 1}/{settings.num_server_rounds} ...")
            shown += 1
        ended = (run_dir / "summary.json").exists() or (run_dir / "error.txt").exists()
        if ended or time.monotonic() - asked > STATUS_SECONDS:
            listed = _flwr(["list", "--run-id", run_id, "--format", "json"], environment)
            status = str(listed["runs"][0]["status"])
            if status.startswith("finished"):
                return status
            asked = time.monotonic()
        time.sleep(POLL_SECONDS)


def _flwr(words: list[str], environment: dict[str, str]) -> dict[str, Any]:
    done = subprocess.run(
        ["flwr", *words], env=environment, capture_output=True, text=True, check=False
    )
    try:
        return dict(json.loads(done.stdout))
    except ValueError:
        raise RunFailed(f"flwr {words[0]}: {(done.stderr or done.stdout).strip()}") from None


def free_port() -> int:
    """Return a port of this machine on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for_port(port: int, process: subprocess.Popen[bytes], run_dir: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(POLL_SECONDS / 5)
    raise RunFailed(f"flower-superlink did not start; its log: {run_dir / LOG}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and everything it started, Ray included; a second Ctrl-C has to wait."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        family = [
            *psutil.Process(process.pid).children(recursive=True),
            psutil.Process(process.pid),
        ]
    except psutil.NoSuchProcess:
        family = []
    for kill in (signal.SIGTERM, signal.SIGKILL):
        for member in family:
            if member.is_running():
                member.send_signal(kill)
        _, family = psutil.wait_procs(family, timeout=5)
    process.wait()
    signal.signal(signal.SIGINT, signal.default_int_handler)
