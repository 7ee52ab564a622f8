"""Flower's real processes for tests: on loopback, on free ports, ended whatever happens."""

import json
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil

from pfedmoap_flwr.engines.simulation import flower_environment
from support import ROOT

APP = ROOT
MARK = "PFEDMOAP_TEST_PROCESSES"
RUN_SECONDS = 1800.0
SLOW_START = "Failed to start local SuperLink within"
STATUS_SECONDS = 20.0
POLL_SECONDS = 0.5


class Processes:
    """What one test starts. A mark in the environment finds all descendants, orphans included."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self.environment = {**environment, MARK: uuid4().hex}
        self._started: list[subprocess.Popen[bytes]] = []

    def start(
        self, name: str, command: Sequence[str], *, terminal: int | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a command in a session of its own; it writes to <name>.log, or to a terminal."""
        with (self.folder / f"{name}.log").open("ab") as log:
            output = log.fileno() if terminal is None else terminal
            process = subprocess.Popen(
                command,
                env=self.environment,
                cwd=self.folder,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def run(
        self, command: Sequence[str], *, check: bool = True, timeout: float = RUN_SECONDS
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end and return what it printed."""
        done = subprocess.run(
            command,
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
        return done

    def flwr(self, *words: str) -> dict[str, Any]:
        """Run a flwr command that prints JSON."""
        return dict(json.loads(self.run(["flwr", *words, "--format", "json"]).stdout))

    def flwr_run(
        self, connection: str, settings: Mapping[str, Any], run_dir: Path, *words: str
    ) -> str:
        """Submit a run of this app, wait for its end and return its status."""
        summary = run_dir / "summary.json"
        summary.unlink(missing_ok=True)
        run_config = " ".join(f"{key}={json.dumps(value)}" for key, value in settings.items())
        command = ["run", str(APP), connection, "--run-config", run_config, *words]
        deadline = time.monotonic() + RUN_SECONDS
        started = self.flwr(*command)
        # Flower gives its local SuperLink 15 s to start, too little on a busy machine
        while SLOW_START in started.get("error-message", "") and time.monotonic() < deadline:
            started = self.flwr(*command)
        assert started["success"], started
        status, asked = "never listed", time.monotonic()
        while time.monotonic() < deadline and not status.startswith("finished"):
            time.sleep(POLL_SECONDS)
            # Asking costs two seconds of a core
            if summary.exists() or time.monotonic() - asked > STATUS_SECONDS:
                listed = self.flwr("list", connection, "--run-id", str(started["run-id"]))
                status, asked = str(listed["runs"][0]["status"]), time.monotonic()
        return status

    def alive(self) -> list[psutil.Process]:
        """Return all processes that carry the mark."""
        return [process for process in psutil.process_iter() if self._is_marked(process)]

    def left_behind(self, grace: float = 5.0) -> list[psutil.Process]:
        """Return what is alive still after some seconds."""
        return psutil.wait_procs(self.alive(), timeout=grace)[1]

    def end(self) -> None:
        """End all that is left."""
        # nginx writes its title over its environment, and with it the mark
        for started in self._started:
            started.terminate()
        while left := self.alive():
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, timeout=5)

    def _is_marked(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get(MARK) == self.environment[MARK]
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return False


@contextmanager
def processes(folder: Path, **environment: str | None) -> Iterator[Processes]:
    """Yield Processes with one thread each and their own Flower home; None removes a variable."""
    changes = {"OMP_NUM_THREADS": "1", "FLWR_HOME": str(folder / "flower"), **environment}
    merged = {**flower_environment(), **changes}
    started = Processes(folder, {key: v for key, v in merged.items() if v is not None})
    (folder / "flower").mkdir(parents=True)
    # A time limit of the test machine must not leave orphans either
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield started
    finally:
        started.end()
        signal.signal(signal.SIGTERM, before)


def stop(processes: Sequence[subprocess.Popen[bytes]], timeout: float = 30.0) -> None:
    """Stop processes the way Ctrl-C does and wait for their end."""
    for process in processes:
        process.send_signal(signal.SIGINT)
    for process in processes:
        process.wait(timeout)


def wait_for_port(port: int, timeout: float = 60.0) -> None:
    """Wait until something listens on a port of this machine."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(POLL_SECONDS)
    raise AssertionError(f"nothing listens on port {port} after {timeout:g} s")
