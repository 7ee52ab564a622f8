"""The folders that a deployment needs: one for its CA, one for the server, one for each site."""

import ipaddress
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from pfedmoap_flwr.deploy.keys import CERTIFICATE, KEY, Authority, node_pair, pem, private_pem
from pfedmoap_flwr.deploy.site import FILE, Site, address
from pfedmoap_flwr.errors import UsageError

PLACE = Path("/etc/pfedmoap")
"""Where the server's or a site's folder lies on its host, as its unit file and README say."""
STATE = Path("/var/lib/pfedmoap")
IMAGES = Path("/srv/pfedmoap/images")
TEMPLATES = Path(__file__).parent / "templates"
SITE = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")
LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
HOST = re.compile(rf"(?=.{{1,253}}$){LABEL}(\.{LABEL})*", re.IGNORECASE)
PLAIN = re.compile(r"/[\w./-]+", re.ASCII)
CONNECTION = "pfedmoap"
PRIVATE, SCRIPT, FOLDER = 0o600, 0o700, 0o700


@dataclass(frozen=True)
class Kit:
    """What a deployment is.

    sites: names of its sites; their order gives their client numbers.
    host, port: where the nodes call the server, by name or address.
    superlink_port: the SuperLink's, on the server's loopback; equal to `port` where nothing stands
        between it and the nodes.
    place: where each folder will lie on its host; None for where it is made.
    state: where server and nodes keep what lasts.
    """

    sites: tuple[str, ...]
    host: str
    port: int = 8443
    superlink_port: int = 8000
    place: Path | None = PLACE
    state: Path = STATE

    def __post_init__(self) -> None:
        """Raise UsageError for a name that could not stand in a certificate or a unit file."""
        for site in self.sites:
            if not SITE.fullmatch(site):
                raise UsageError(
                    f"--sites: {site!r} is no name of a site; use up to 32 of a-z, 0-9 and -"
                )
        twice = sorted({site for site in self.sites if self.sites.count(site) > 1})
        if twice:
            raise UsageError(f"--sites: {twice[0]} is named twice")
        if not _is_host(self.host):
            raise UsageError(
                f"--server: {self.host!r} is no host name or IP address that nodes can call "
                "(without scheme and port)"
            )
        if self.place and not PLAIN.fullmatch(str(self.place)):
            raise UsageError(
                f"--place {self.place}: use an absolute path of letters, digits and ._/- alone; "
                "it stands in unit files"
            )


def write_kit(kit: Kit, out: Path, ca: Path | None = None) -> None:
    """Write all folders of a kit to `out`, whole or not at all; private keys are the owner's alone.

    ca: the folder of an earlier kit's CA, to renew a certificate or add sites; None for a new one.

    Raises UsageError where `out` exists already or cannot be made: no key is ever overwritten.
    """
    if out.exists() or out.is_symlink():
        raise UsageError(f"--out {out} exists already; nothing was written, name another folder")
    authority = Authority.read(ca) if ca else Authority.create()
    part = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # Of mode 0700 from the start
        part = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        _write_all(kit, part, out.absolute(), authority)
        part.rename(out)
    except OSError as error:
        raise UsageError(f"--out {out} cannot be made: {error.strerror}") from error
    finally:
        if part:
            shutil.rmtree(part, ignore_errors=True)


def _write_all(kit: Kit, part: Path, out: Path, authority: Authority) -> None:
    for name in ("ca", "server", "server/keys", "sites", *(f"sites/{site}" for site in kit.sites)):
        (part / name).mkdir(mode=FOLDER)
    _write(part / "ca" / CERTIFICATE, pem(authority.certificate))
    _write(part / "ca" / KEY, private_pem(authority.key))
    _write_server(kit, part / "server", kit.place or out / "server", authority)
    for client, site in enumerate(kit.sites):
        place = kit.place or out / "sites" / site
        public = _write_site(kit, client, part / "sites" / site, place, authority)
        _write(part / "server" / "keys" / f"{site}.pub", public)


def _write_server(kit: Kit, folder: Path, place: Path, authority: Authority) -> None:
    certificate, key = authority.server(kit.host)
    _write(folder / CERTIFICATE, pem(authority.certificate))
    _write(folder / "server.crt", certificate)
    _write(folder / "server.key", key)
    listen = f"[::]:{kit.port}" if ":" in kit.host else str(kit.port)
    _fill(
        "server",
        folder,
        {
            **_common(kit, place),
            "HOST": kit.host,
            "PORT": str(kit.port),
            "LISTEN": listen,
            "SUPERLINK_PORT": str(kit.superlink_port),
            "SITES": ", ".join(kit.sites),
            "CLIENTS": str(len(kit.sites)),
        },
    )


def _write_site(kit: Kit, client: int, folder: Path, place: Path, authority: Authority) -> bytes:
    """Write a site's folder and return its public key."""
    name = kit.sites[client]
    site = Site(name, client, len(kit.sites), kit.host, kit.port, str(IMAGES), str(kit.state))
    private, public = node_pair(name)
    _write(folder / CERTIFICATE, pem(authority.certificate))
    _write(folder / "node.key", private)
    _write(folder / "node.pub", public)
    _write(folder / FILE, site.text().encode())
    words = {"SITE": name, "CLIENT": str(client), "SERVER": address(kit.host, kit.port)}
    _fill("site", folder, {**_common(kit, place), **words, "DATA": str(IMAGES)})
    return public


def _common(kit: Kit, place: Path) -> dict[str, str]:
    return {
        "PLACE": str(place),
        "STATE": str(kit.state),
        "CONNECTION": CONNECTION,
        "FLWR": version("flwr"),
    }


def _fill(templates: str, folder: Path, words: Mapping[str, str]) -> None:
    """Write the files of a folder of templates with every @WORD@ filled in."""
    for template in sorted((TEMPLATES / templates).iterdir()):
        text = re.sub(r"@([A-Z_]+)@", lambda found: words[found[1]], template.read_text())
        mode = SCRIPT if template.suffix == ".sh" else PRIVATE
        _write(folder / template.name, text.encode(), mode)


def _write(path: Path, content: bytes, mode: int = PRIVATE) -> None:
    # Never readable by others, not even between its making and a chmod
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        os.fchmod(file.fileno(), mode)
        file.write(content)


def _is_host(name: str) -> bool:
    try:
        return not ipaddress.ip_address(name).is_unspecified
    except ValueError:
        return bool(HOST.fullmatch(name)) and not re.fullmatch(r"[\d.]+", name)


def split_sites(text: str) -> Sequence[str]:
    """Return the names between commas. Raises UsageError where there is none."""
    names = [name.strip() for name in text.split(",")]
    if names == [""]:
        raise UsageError("--sites: name at least one site, as in --sites a,b,c")
    return names
