"""pfedmoap deploy check: each thing that can be missing, made missing, is the one that is named."""

import shutil
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pfedmoap_flwr.cli import main as cli
from pfedmoap_flwr.deploy import keys
from pfedmoap_flwr.deploy.kit import Kit, write_kit
from pfedmoap_flwr.deploy.site import FILE, Site
from support.copies import write_tree
from support.tiny import TINY

WORDS = [f"{key}={value}" for key, value in TINY.items() if key != "data.num-clients"]
WORDS += ["data.classnames=cat,dog,red panda"]
Printed = pytest.CaptureFixture[str]


@contextmanager
def listening(server: Path, seconds_off: float = 0.0) -> Iterator[int]:
    """A server with the certificate of a kit's folder, whose clock may be wrong; its port."""

    class Answering(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(404)
            self.end_headers()

        def date_time_string(self, timestamp: float | None = None) -> str:
            return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds_off), usegmt=True)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server / "server.crt", server / "server.key")
    answering = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    # The handshake is the thread's of a connection: one that only looks must not block the rest
    answering.socket = context.wrap_socket(
        answering.socket, server_side=True, do_handshake_on_connect=False
    )
    threading.Thread(target=answering.serve_forever, daemon=True).start()
    try:
        yield answering.server_address[1]
    finally:
        answering.shutdown()
        answering.server_close()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site's folder with images; its server does not listen yet."""
    monkeypatch.setenv("PFEDMOAP_CACHE", str(tmp_path / "cache"))
    write_kit(Kit(("a", "b"), "127.0.0.1"), tmp_path / "kit")
    write_tree(tmp_path / "images", {"cat": 10, "dog": 10, "red_panda": 10})
    folder = tmp_path / "kit" / "sites" / "b"
    tell(folder, data=str(tmp_path / "images"), state=str(tmp_path / "state"))
    return folder


def tell(folder: Path, **changes: object) -> None:
    """Change what site.env says."""
    told = {**vars(Site.read(folder)), **changes}
    (folder / FILE).write_text(Site(**told).text())


def check(folder: Path, capsys: Printed, *words: str) -> tuple[int, dict[str, str], list[str]]:
    """Run the command; return its status, its lines by subject, and what it finds missing."""
    capsys.readouterr()
    status = cli.main(["deploy", "check", str(folder), *WORDS, *words])
    lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    said = {what: text for state, what, text in lines if state in ("ok", "MISSING")}
    return status, said, [what for state, what, _ in lines if state == "MISSING"]


def test_a_node_that_can_take_part(site: Path, capsys: Printed) -> None:
    before = {path: path.read_bytes() for path in site.rglob("*") if path.is_file()}
    with listening(site.parents[1] / "server") as port:
        tell(site, port=port)
        before[site / FILE] = (site / FILE).read_bytes()
        status, said, missing = check(site, capsys)
    assert (status, missing) == (0, [])
    assert (
        "21 train, 3 validation, 6 test images of 3 classes (cat, dog, red panda)" in said["data"]
    )
    assert "127.0.0.1, localhost" in said["certificate"]
    assert "secp384r1" in said["key"]
    assert said["server"] == f"127.0.0.1:{port} can be reached"
    # It only looked
    assert {path: path.read_bytes() for path in site.rglob("*") if path.is_file()} == before
    assert not (site.parents[2] / "state").exists()


def spoil_key(site: Path) -> None:
    (site / "node.key").write_text("no key")


def open_key(site: Path) -> None:
    (site / "node.key").chmod(0o644)


def swap_key(site: Path) -> None:
    shutil.copy(site.parent / "a" / "node.key", site / "node.key")


def lose_ca(site: Path) -> None:
    (site / "ca.crt").unlink()


def lose_images(site: Path) -> None:
    tell(site, data=str(site / "nowhere"))


def lose_class(site: Path) -> None:
    Path(Site.read(site).data, "cat").rename(Path(Site.read(site).data, "lion"))


def file_for_state(site: Path) -> None:
    tell(site, state=str(site / FILE))


@pytest.mark.parametrize(
    ("spoil", "what", "named"),
    [
        (spoil_key, ["key"], "cannot be read"),
        (open_key, ["key"], "chmod 600"),
        (swap_key, ["key"], "does not belong to node.key"),
        (lose_ca, ["ca", "certificate"], "ca.crt cannot be read"),
        (lose_images, ["data"], "no folder that can be read; DATA in site.env"),
        (lose_class, ["data"], "lion"),
        (file_for_state, ["disk"], "site.env cannot be written"),
    ],
)
def test_what_is_missing_is_named(
    spoil: Callable[[Path], None], what: list[str], named: str, site: Path, capsys: Printed
) -> None:
    spoil(site)
    with listening(site.parents[1] / "server") as port:
        tell(site, port=port)
        status, said, missing = check(site, capsys)
    assert (status, missing) == (1, what)
    assert named in said[what[0]]


def test_weights_and_room_that_are_missing(
    site: Path, capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(site)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with listening(site.parents[1] / "server") as port:
        tell(site, port=port)
        words = ["clip.model=RN50-quickgelu", "clip.pretrained=no-such-weights"]
        status, said, missing = check(site, capsys, *words)
    assert (status, missing) == (1, ["weights", "disk"])
    assert "0 MB free" in said["disk"]


def test_a_server_that_is_not_reached(site: Path, capsys: Printed) -> None:
    with listening(site.parents[1] / "server") as port:
        tell(site, port=port)
    status, said, missing = check(site, capsys)
    assert (status, missing) == (1, ["server", "certificate", "clock"])
    assert f"127.0.0.1:{port} cannot be reached" in said["server"]


@pytest.mark.parametrize("off", [-20.0, 400.0])
def test_a_clock_that_flower_would_refuse(off: float, site: Path, capsys: Printed) -> None:
    with listening(site.parents[1] / "server", off) as port:
        tell(site, port=port)
        status, said, missing = check(site, capsys)
    assert (status, missing) == (1, ["clock"])
    assert ("ahead of" if off < 0 else "behind") in said["clock"]


def test_an_expired_certificate_and_one_of_another_host(
    site: Path, capsys: Printed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ca = site.parents[1] / "ca"
    monkeypatch.setattr(keys, "LOOPBACK", ())
    write_kit(Kit(("a",), "10.0.0.9"), tmp_path / "elsewhere", ca)
    monkeypatch.setattr(keys, "SERVER_DAYS", 0)
    write_kit(Kit(("a",), "127.0.0.1"), tmp_path / "old", ca)
    for name, reason in (("elsewhere", "mismatch"), ("old", "expired")):
        with listening(tmp_path / name / "server") as port:
            tell(site, port=port)
            status, said, missing = check(site, capsys)
        assert (status, missing) == (1, ["certificate"])
        assert reason in said["certificate"]
    assert "it is of 127.0.0.1, valid" in said["certificate"]


def test_a_server_of_another_ca(site: Path, capsys: Printed, tmp_path: Path) -> None:
    write_kit(Kit(("a",), "127.0.0.1"), tmp_path / "other")
    with listening(tmp_path / "other" / "server") as port:
        tell(site, port=port)
        assert check(site, capsys)[::2] == (1, ["certificate"])


def test_a_folder_that_is_no_sites_is_wrong_use(
    site: Path, capsys: Printed, tmp_path: Path
) -> None:
    assert cli.main(["deploy", "check", str(tmp_path)]) == 2
    assert "is this a site's folder?" in capsys.readouterr().err
    (site / FILE).write_text("SITE=b\n")
    assert cli.main(["deploy", "check", str(site)]) == 2
    assert "site.env has no CLIENT" in capsys.readouterr().err
