"""site.env: what a site says of itself, read by its start script and by `pfedmoap deploy check`."""

import shlex
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from pfedmoap_flwr.errors import UsageError

FILE = "site.env"
HEAD = "# This site, in one place: start.sh and `pfedmoap deploy check` read it.\n"


@dataclass(frozen=True)
class Site:
    """A node of a deployment.

    site: its name. client, clients: its number, from 0, and how many there are.
    host, port: where the server is called.
    data: the folder of its images; "" where it takes its part of the run's data set.
    state: where it keeps its head between rounds and runs.
    node_port: on its own loopback, where the SuperNode and its client processes talk.
    budget: largest epsilon of all its uploads in all runs, as text; "" for none.
    min_count: scores that tell of fewer images of a class never leave it, whatever a run says.
    """

    site: str
    client: int
    clients: int
    host: str
    port: int
    data: str
    state: str
    node_port: int = 9094
    budget: str = ""
    min_count: int = 0

    @property
    def address(self) -> str:
        """The server as HOST:PORT."""
        return address(self.host, self.port)

    def text(self) -> str:
        """Return the file, which a shell reads as well."""
        lines = [f"{k.upper()}={shlex.quote(str(v))}" for k, v in asdict(self).items()]
        return HEAD + "\n".join(lines) + "\n"

    @classmethod
    def read(cls, folder: Path) -> "Site":
        """Read the file of a site's folder. Raises UsageError that names what is wrong in it."""
        path = folder / FILE
        said = read_env(path, "site's")
        try:
            values = {f.name: f.type(said[f.name.upper()]) for f in fields(cls)}  # type: ignore[operator]
        except KeyError as error:
            raise UsageError(f"{path} has no {error.args[0]}") from error
        except ValueError as error:
            raise UsageError(f"{path}: {error}") from error
        return cls(**values)


def address(host: str, port: int) -> str:
    """Return HOST:PORT, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def read_env(path: Path, whose: str) -> dict[str, str]:
    """Return what a kit's file for a shell says. Raises UsageError where it cannot be read."""
    try:
        words = shlex.split(path.read_text(), comments=True)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}; is this a {whose} folder?") from error
    return dict(word.partition("=")[::2] for word in words)
