"""What a node lacks before a run: looked at from its own machine, one finding after the other."""

import http.client
import os
import shutil
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from pfedmoap_flwr import config, files
from pfedmoap_flwr.cache import cache_folder
from pfedmoap_flwr.clip.weights import find_weights, held_checkpoint
from pfedmoap_flwr.config import Settings
from pfedmoap_flwr.data.federated import Federated, federated, own_folder
from pfedmoap_flwr.data.sources.hub import offline
from pfedmoap_flwr.deploy.keys import CERTIFICATE
from pfedmoap_flwr.deploy.site import Site
from pfedmoap_flwr.engines.simulation import flower_environment
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.settings import Value

AHEAD, BEHIND = 5.0, 300.0
"""Seconds that Flower lets a node's clock be off: it signs the time of every request."""
ROOM = 1 << 30
CONNECT_SECONDS = 10.0


@dataclass(frozen=True)
class Finding:
    """One thing that a run needs: whether it is there, and what was seen."""

    what: str
    good: bool
    said: str


class Missing(Exception):
    """What a finding lacks, in one line."""


@dataclass(frozen=True)
class Look:
    """What all checks look at."""

    folder: Path
    site: Site
    settings: Settings


def examine(
    folder: Path, values: Mapping[str, Value], data: str | None = None
) -> Iterator[Finding]:
    """Yield what is found of a site's folder, in the order in which a run needs it.

    values: the settings of the run; data: a folder of images in place of site.env's.

    Raises UsageError where the folder is no site's, or a setting is wrong.
    """
    site = Site.read(folder)
    settings = config.parse({"data.num-clients": site.clients, **values})
    if data is not None:
        site = Site(**{**vars(site), "data": data})
    look = Look(folder, site, settings)
    for what, check in CHECKS.items():
        try:
            yield Finding(what, True, check(look))
        except (Missing, UsageError) as error:
            yield Finding(what, False, " ".join(str(error).split()))


def _programs(look: Look) -> str:
    found = shutil.which("flower-supernode", path=flower_environment()["PATH"])
    if not found:
        raise Missing("no flower-supernode; install the package: pip install /opt/pfedmoap/app")
    return f"{found}, flwr {version('flwr')}: the server needs the same"


def _data(look: Look) -> str:
    with offline():
        held = _held(look)
    client = held.clients.get(look.site.client)
    if client is None:
        raise Missing(f"client {look.site.client} has no part of {look.settings.data.name}")
    sizes = ", ".join(f"{len(rows)} {split}" for split, rows in client.rows.items())
    names = ", ".join(held.task.classnames[:5]) + (" ..." if len(held.task.classnames) > 5 else "")
    where = look.site.data or f"part {look.site.client} of {held.images.name}"
    return f"{where}: {sizes} images of {len(held.task.classnames)} classes ({names})"


def _held(look: Look) -> Federated:
    settings, site = look.settings, look.site
    if not site.data:
        return federated(settings.data, settings.seed)
    if not os.access(site.data, os.R_OK | os.X_OK):
        raise Missing(f"{site.data} is no folder that can be read; DATA in site.env names it")
    return own_folder(settings.data, site.data, site.client, settings.seed)


def _weights(look: Look) -> str:
    model, pretrained = look.settings.clip.model, look.settings.clip.pretrained
    held = held_checkpoint(model, find_weights(model, pretrained))
    if held is None or not held.is_file():
        raise Missing(
            f"weights '{pretrained}' for {model} are not here; get them with pfedmoap data "
            f"prepare clip.model={model} clip.pretrained={pretrained}"
        )
    return str(held)


def _key(look: Look) -> str:
    path = look.folder / "node.key"
    try:
        private = load_ssh_private_key(path.read_bytes(), None)
        public = load_ssh_public_key((look.folder / "node.pub").read_bytes())
    except (OSError, ValueError, TypeError) as error:
        raise Missing(f"node.key or node.pub cannot be read: {error}") from error
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise Missing("node.key is no EC key; make one: ssh-keygen -t ecdsa -b 384")
    if private.public_key() != public:
        raise Missing("node.pub does not belong to node.key; the server knows another node")
    if path.stat().st_mode & 0o077:
        raise Missing(f"{path} can be read by others; chmod 600 {path}")
    return f"{path}, {private.curve.name}, node.pub belongs to it"


def _ca(look: Look) -> str:
    path = look.folder / CERTIFICATE
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise Missing(f"{path} cannot be read: {error}") from error
    if not certificate.not_valid_before_utc < datetime.now(UTC) < certificate.not_valid_after_utc:
        raise Missing(f"{path} is valid {_period(certificate)}, and it is {_today()} here")
    return f"{path}, valid {_period(certificate)}"


def _server(look: Look) -> str:
    try:
        with _connected(look):
            return f"{look.site.address} can be reached"
    except OSError as error:
        raise Missing(f"{look.site.address} cannot be reached: {error}") from error


def _certificate(look: Look) -> str:
    """Do the handshake that a SuperNode does, and name what Flower's log would not."""
    shown = x509.load_der_x509_certificate(_shown(look))
    try:
        trusted = ssl.create_default_context(cafile=str(look.folder / CERTIFICATE))
        with (
            _connected(look) as connection,
            trusted.wrap_socket(connection, server_hostname=look.site.host),
        ):
            return f"of {_names(shown)}, signed by {CERTIFICATE}, valid {_period(shown)}"
    except ssl.SSLCertVerificationError as error:
        seen = f"it is of {_names(shown)}, valid {_period(shown)}, and it is {_today()} here"
        raise Missing(f"{error.verify_message}; {seen}") from error
    except OSError as error:
        raise Missing(f"no TLS with {look.site.address}: {error}") from error


def _shown(look: Look) -> bytes:
    """Return the certificate that the server shows, DER, trusted or not."""
    try:
        with (
            _connected(look) as connection,
            _untrusting().wrap_socket(connection, server_hostname=look.site.host) as secured,
        ):
            return secured.getpeercert(binary_form=True) or b""
    except OSError as error:
        raise Missing(f"not seen: no TLS with {look.site.address} ({error})") from error


def _clock(look: Look) -> str:
    site = look.site
    asked = http.client.HTTPSConnection(
        site.host, site.port, timeout=CONNECT_SECONDS, context=_untrusting()
    )
    try:
        asked.request("HEAD", "/")
        said = asked.getresponse().getheader("Date")
        server = parsedate_to_datetime(said or "")
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Missing(f"not compared with the server's: {error}") from error
    finally:
        asked.close()
    # The server says whole seconds
    ahead = (datetime.now(UTC) - server).total_seconds() - 0.5
    limits = f"Flower allows {AHEAD:g} s ahead and {BEHIND:g} s behind"
    off = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the server's; {limits}"
    if not -BEHIND < ahead < AHEAD:
        raise Missing(f"{off}; set it by NTP")
    return off


def _disk(look: Look) -> str:
    found = []
    for folder in (Path(look.site.state), cache_folder()):
        there = files.nearest(folder)
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise Missing(f"{folder} cannot be written as a folder by this user")
        room = shutil.disk_usage(there).free
        if room < ROOM:
            raise Missing(f"{folder} has {room / 1e6:.0f} MB free; make it {ROOM / 1e6:.0f}")
        found.append(f"{folder} {room / 1e9:.0f} GB free")
    return ", ".join(found)


CHECKS: dict[str, Callable[[Look], str]] = {
    "programs": _programs,
    "data": _data,
    "weights": _weights,
    "disk": _disk,
    "key": _key,
    "ca": _ca,
    "server": _server,
    "certificate": _certificate,
    "clock": _clock,
}


def _connected(look: Look) -> socket.socket:
    return socket.create_connection((look.site.host, look.site.port), CONNECT_SECONDS)


def _untrusting() -> ssl.SSLContext:
    """Return a context for looking only: nothing that is sent or read over it is secret."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _names(certificate: x509.Certificate) -> str:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return "nobody (no subjectAltName)"
    return ", ".join(str(name.value) for name in names)


def _period(certificate: x509.Certificate) -> str:
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return f"{start:%Y-%m-%d} to {end:%Y-%m-%d}"


def _today() -> str:
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
