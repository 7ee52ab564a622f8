"""A whole deployment on this machine: a SuperLink with TLS, nodes with keys, one run, and its end.

It uses the very folders that `pfedmoap site-kit` makes. Only nginx is left out: the nodes call the
SuperLink's own port, on loopback.
"""

import functools
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from pfedmoap_flwr import api, files
from pfedmoap_flwr.api import Plan, RunResult
from pfedmoap_flwr.deploy.kit import Kit, write_kit
from pfedmoap_flwr.deploy.site import FILE, Site
from pfedmoap_flwr.engines.simulation import (
    LOG,
    Ask,
    app_folder,
    flower_environment,
    flwr,
    free_port,
    run_through,
    wait_for_port,
)
from pfedmoap_flwr.engines.watchdog import Family, family
from pfedmoap_flwr.errors import RunFailed, UsageError
from pfedmoap_flwr.settings import Value

SMALL: dict[str, Value] = {
    "data.partition": "pathological",
    "data.shots": 4,
    "local-epochs": 1,
    "num-server-rounds": 2,
}
"""A run that ends within minutes: what a rehearsal shows does not depend on its length."""


def plan_rehearsal(values: Mapping[str, Value], nodes: int, images: Sequence[Path] = ()) -> Plan:
    """Check everything before anything starts. Raises UsageError.

    images: the folder of each node; none: they share the data set of the settings.
    """
    if "data.num-clients" in values:
        raise UsageError("setting data.num-clients: is what --nodes says; leave one out")
    if images and len(images) != nodes:
        raise UsageError(f"--data: {len(images)} folders for {nodes} nodes; give one for each")
    for folder in images:
        if not folder.is_dir():
            raise UsageError(f"--data {folder}: no such folder")
    app_folder()
    small: dict[str, Value] = {} if values.get("resume") else dict(SMALL)
    if small and images:
        small["data.name"] = "folder"
    everything = {**small, **values, "data.num-clients": nodes}
    return api.plan(everything, own_images=bool(images))


def rehearse(plan: Plan, images: Sequence[Path], console: Console) -> RunResult:
    """Deploy on loopback, run once, take everything down, and return what the run left.

    images: the folder of each node, or none.

    Raises RunFailed with the reason.
    """
    log = plan.run_dir / LOG
    plan.run_dir.mkdir(parents=True, exist_ok=True)
    with (
        family("pfedmoap-deploy-", flower_environment(), log) as started,
        console.status("starting the server ...") as live,
    ):
        ask = _start(started, plan, images, console)
        live.update("the nodes introduce themselves ...")
        run_through(ask, plan.settings, plan.run_dir, live, log)
    return RunResult.read(plan.run_dir)


def _start(started: Family, plan: Plan, images: Sequence[Path], console: Console) -> Ask:
    """Make the kit, start server and nodes, and return what asks the SuperLink."""
    port, folder, nodes = free_port(), started.home, plan.settings.data.num_clients
    sites = tuple(f"site-{client}" for client in range(nodes))
    kit = Kit(sites, "127.0.0.1", port, port, place=None, state=folder / "server-state")
    write_kit(kit, folder / "kit")
    _say(console, "keys", f"a CA, the server's certificate for 127.0.0.1, {nodes} node keys")
    server = folder / "kit" / "server"
    superlink = started.start([str(server / "start.sh")], plan.run_dir / LOG)
    wait_for_port(port, superlink, plan.run_dir)
    _say(console, "server", f"SuperLink on 127.0.0.1:{port}, TLS, registered keys alone")
    registered = subprocess.run(
        [str(server / "register.sh")],
        env=started.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if registered.returncode:
        raise RunFailed(f"the keys were not registered: {registered.stderr.strip()}")
    _say(console, "registered", ", ".join(sites))
    for client, site in enumerate(sites):
        data = str(images[client].resolve()) if images else ""
        own = folder / "kit" / "sites" / site
        # Heads lie in the run's folder, as those of an in-process run do, so that it can be resumed
        node = replace(Site.read(own), data=data, state=str(plan.run_dir), node_port=free_port())
        files.replace(own / FILE, node.text())
        # In a shared one a node would load the app while another is still unpacking it
        home = f"FLWR_HOME={folder / f'flower-{site}'}"
        started.start(["env", home, str(own / "start.sh")], plan.run_dir / f"{site}.log")
    _say(console, "nodes", f"{nodes} SuperNodes; their logs: {plan.run_dir}/site-*.log")
    return functools.partial(flwr, environment=started.environment, program=str(server / "flwr.sh"))


def _say(console: Console, what: str, line: str) -> None:
    console.print(f"{what:13} {line}", highlight=False, soft_wrap=True, markup=False)
