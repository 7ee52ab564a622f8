"""pfedmoap site-kit: the folders of a deployment."""

from pathlib import Path

from rich.console import Console

from pfedmoap_flwr.cli.say import say
from pfedmoap_flwr.deploy.kit import Kit, split_sites, write_kit
from pfedmoap_flwr.errors import UsageError


def make_kit(
    out: Path,
    sites: str,
    server: str,
    port: int,
    ca: Path | None,
    place: Path,
    console: Console,
) -> None:
    """Write a kit and say where each folder goes."""
    kit = Kit(tuple(split_sites(sites)), server, port, place=place.absolute())
    if port == kit.superlink_port:
        raise UsageError(f"--port {port}: is the SuperLink's own on the server; choose another")
    write_kit(kit, out, ca)
    lines = [f"{out}/ca      the CA and its key: keep it where neither server nor sites are"]
    lines += [f"{out}/server  to the server, {server}"]
    lines += [f"{out}/sites/{site}  to site {site}, client {i}" for i, site in enumerate(kit.sites)]
    for line in [*lines, "each folder's README.md says what to do with it, in six lines"]:
        say(console, line)
