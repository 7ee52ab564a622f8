"""A deployment for tests: a kit's SuperLink and SuperNodes, on loopback with TLS and node keys."""

import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from pfedmoap_flwr.deploy.kit import CONNECTION, Kit, write_kit
from pfedmoap_flwr.deploy.site import FILE, Site
from pfedmoap_flwr.engines.simulation import free_port
from pfedmoap_flwr.runs.folder import RunFolder
from support.deployment import POLL_SECONDS, RUN_SECONDS, Processes, wait_for_port
from support.proxy import NGINX, nginx_command
from support.tiny import TINY

PFEDMOAP = [sys.executable, "-m", "pfedmoap_flwr.cli"]
MEMBER_SECONDS = 120.0
CLIENTS = 2
TWO_CLIENTS: dict[str, Any] = {
    **TINY,
    "data.num-clients": CLIENTS,
    "data.partition": "pathological",
    "data.shots": 4,
    "local-epochs": 1,
}


class Deployed:
    """Started by the kit's own scripts; where nginx is installed, it stands before the SuperLink.

    clients: number of sites. images: the folder of each site's own images; none: of the run's set.
    """

    def __init__(self, started: Processes, clients: int, images: Sequence[Path] = ()) -> None:
        self.started = started
        self.root = started.folder
        self.port = free_port()
        self.open_port = free_port() if NGINX else self.port
        self.sites = tuple(f"site-{client}" for client in range(clients))
        self.server_home = self.root / "server"
        self.homes = [self.root / f"node-{client}" for client in range(clients)]
        kit = Kit(
            self.sites,
            "127.0.0.1",
            self.open_port,
            self.port,
            place=None,
            state=self.server_home,
        )
        write_kit(kit, self.root / "kit")
        for client in range(clients):
            folder = self.site_folder(client)
            data = str(images[client]) if images else ""
            home = str(self.homes[client])
            own = replace(Site.read(folder), data=data, state=home, node_port=free_port())
            (folder / FILE).write_text(own.text())
        self.server_folder = self.root / "kit" / "server"
        self.superlink = self.start_superlink()
        if NGINX:
            (self.root / "nginx").mkdir()
            self.started.start("nginx", nginx_command(self.server_folder, self.root / "nginx"))
            wait_for_port(self.open_port)
        self.register()
        config = (self.server_folder / "config.toml").read_text()
        (self.root / "flower" / "config.toml").write_text(
            f'{config}\n[superlink.outside]\naddress = "127.0.0.1:{self.open_port}"\n'
            f'root-certificates = "{self.server_folder / "ca.crt"}"\n'
        )

    def site_folder(self, client: int) -> Path:
        """Return the folder that a site was given."""
        return self.root / "kit" / "sites" / self.sites[client]

    def start_superlink(self) -> subprocess.Popen[bytes]:
        """Start the SuperLink on its database, and wait until it listens."""
        self.superlink = self.started.start("superlink", [str(self.server_folder / "start.sh")])
        wait_for_port(self.port)
        return self.superlink

    def register(self) -> list[str]:
        """Let the sites in, and return what the script says."""
        return self.started.run([str(self.server_folder / "register.sh")]).stdout.splitlines()

    def start_node(self, client: int) -> subprocess.Popen[bytes]:
        """Start a site's SuperNode, with a Flower home of its own as on a machine of its own."""
        script = self.site_folder(client) / "start.sh"
        command = ["env", "-u", "FLWR_HOME", str(script)]
        return self.started.start(f"supernode-{client}", command)

    def start_nodes(self) -> list[subprocess.Popen[bytes]]:
        """Start all SuperNodes."""
        return [self.start_node(client) for client in range(len(self.sites))]

    def nodes(self) -> list[dict[str, str]]:
        """Return what the SuperLink lists of its nodes."""
        return list(self.started.flwr("supernode", "list", CONNECTION)["nodes"])

    def members(self, program: str) -> list[psutil.Process]:
        """Return the processes of one of Flower's programs, as flwr-serverapp."""
        return [process for process in self.started.alive() if _runs(process, program)]

    def wait_for_member(
        self, program: str, owner: subprocess.Popen[bytes], since: float
    ) -> psutil.Process:
        """Wait until a process below another one runs a program, and return it.

        since: seconds of the epoch before which it must not have begun.
        """
        deadline = time.monotonic() + MEMBER_SECONDS
        while time.monotonic() < deadline:
            for process in self.members(program):
                with suppress(psutil.NoSuchProcess):
                    owners = [parent.pid for parent in process.parents()]
                    if owner.pid in owners and process.create_time() >= since:
                        return process
            time.sleep(POLL_SECONDS / 5)
        raise AssertionError(f"no {program} after {MEMBER_SECONDS:g} s")

    def run(self, name: str, *words: str, **settings: object) -> "DeployedRun":
        """Start `pfedmoap deploy run` with settings; `words` are its options."""
        folder = self.server_home / name
        said = [f"{key}={value}" for key, value in {**settings, "run-dir": folder}.items()]
        command = [*PFEDMOAP, "deploy", "run", str(self.server_folder), *words, *said]
        return DeployedRun(self.started.start(name, command), folder, self.root / f"{name}.log")

    def holders(self, content: bytes) -> list[str]:
        """Return the files of Flower on the server that hold some bytes."""
        files = [path for path in self.server_home.glob("state.db*") if path.is_file()]
        return [path.name for path in files if content in path.read_bytes()]

    def wait_for_holder(self, content: bytes) -> None:
        """Wait until some file of Flower on the server holds the bytes."""
        deadline = time.monotonic() + MEMBER_SECONDS
        while not self.holders(content):
            assert time.monotonic() < deadline, "not found"
            time.sleep(POLL_SECONDS / 5)


class DeployedRun:
    """A run under way: its command, its folder and what the command has said so far."""

    def __init__(self, command: subprocess.Popen[bytes], folder: Path, log: Path) -> None:
        self.command = command
        self.folder = RunFolder(folder)
        self.log = log

    def said(self) -> str:
        """Return what the user has been told."""
        return self.log.read_text()

    def wait_for_round(self, number: int) -> float:
        """Wait until a round is written down; return the time, in seconds of time.monotonic()."""
        deadline = time.monotonic() + RUN_SECONDS
        while time.monotonic() < deadline:
            if self.folder.rounds() and self.folder.rounds()[-1].round >= number:
                return time.monotonic()
            assert self.command.poll() is None, self.said()
            time.sleep(POLL_SECONDS / 5)
        raise AssertionError(f"no round {number}: {self.said()}")

    def next_began(self) -> float:
        """Return when the round after the last written one began, in seconds of the epoch.

        A client's process that is older is on its way out. It took more than the second by which
        the clocks of files and of processes may differ.
        """
        return (self.folder.path / "rounds.jsonl").stat().st_mtime - 1

    def wait(self) -> int:
        """Wait until the command ends, and return its status."""
        return self.command.wait(RUN_SECONDS)


def _runs(process: psutil.Process, program: str) -> bool:
    try:
        return program in {Path(word).name for word in process.cmdline()[:2]}
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return False
