"""The kit's folders, seen by others: TLS itself, OpenSSL, a shell, systemd, Flower's reader."""

import configparser
import os
import re
import shutil
import ssl
import stat
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from flwr.common.config import parse_config_args

from pfedmoap_flwr.cli import main as cli
from pfedmoap_flwr.deploy.kit import Kit, write_kit
from pfedmoap_flwr.deploy.site import FILE, Site
from pfedmoap_flwr.errors import UsageError
from support.proxy import closed, locations

SITES = ("north", "south-2")
HOST = "fl.example.org"
UNITS = ("server/pfedmoap-superlink.service", "sites/north/pfedmoap-supernode.service")


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kit as the command writes it, by a user whose umask hides nothing."""
    out = tmp_path_factory.mktemp("kit") / "kit"
    before = os.umask(0)
    try:
        words = ["site-kit", "--sites", ",".join(SITES), "--server", HOST, "--out", str(out)]
        assert cli.main(words) == 0
    finally:
        os.umask(before)
    return out


def shake_hands(server: Path, ca: Path, name: str) -> None:
    """Do a TLS handshake in memory. Raises ssl.SSLError where the client does not trust."""
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.load_cert_chain(server / "server.crt", server / "server.key")
    ours = ssl.create_default_context(cafile=str(ca))
    ours.verify_flags |= ssl.VERIFY_X509_STRICT
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = ours.wrap_bio(down, up, server_hostname=name)
    answering = theirs.wrap_bio(up, down, server_side=True)
    for side in (client, answering, client, answering):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    client.do_handshake()


@pytest.mark.parametrize("name", [HOST, "localhost", "127.0.0.1", "::1"])
def test_the_servers_certificate_is_trusted_by_its_names(name: str, kit: Path) -> None:
    for folder in (kit / "server", *(kit / "sites" / site for site in SITES)):
        shake_hands(kit / "server", folder / "ca.crt", name)


@pytest.mark.parametrize("name", ["example.org", "127.0.0.2"])
def test_and_by_no_other(name: str, kit: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        shake_hands(kit / "server", kit / "ca" / "ca.crt", name)


def test_an_address_may_be_the_host_and_another_ca_is_not_trusted(
    kit: Path, tmp_path: Path
) -> None:
    write_kit(Kit(("a",), "2001:db8::7"), tmp_path / "other")
    shake_hands(tmp_path / "other" / "server", tmp_path / "other" / "ca" / "ca.crt", "2001:db8::7")
    assert "listen [::]:8443 ssl;" in (tmp_path / "other" / "server" / "nginx.conf").read_text()
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(tmp_path / "other" / "server", kit / "ca" / "ca.crt", "localhost")


@pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl here")
def test_openssl_finds_the_chain_in_order(kit: Path) -> None:
    command = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver"]
    command += ["-CAfile", str(kit / "ca" / "ca.crt"), "-verify_hostname", HOST]
    subprocess.run([*command, str(kit / "server" / "server.crt")], check=True)


def test_the_folders_may_lie_elsewhere(tmp_path: Path) -> None:
    words = ["site-kit", "--sites", "a", "--server", HOST, "--place", "/opt/fl"]
    assert cli.main([*words, "--out", str(tmp_path / "kit")]) == 0
    named = {
        "server/config.toml": 'root-certificates = "/opt/fl/ca.crt"',
        "server/nginx.conf": "ssl_certificate_key /opt/fl/server.key;",
        "server/pfedmoap-superlink.service": "ExecStart=/opt/fl/start.sh",
        "sites/a/pfedmoap-supernode.service": "ExecStart=/opt/fl/start.sh",
    }
    for path, line in named.items():
        assert line in (tmp_path / "kit" / path).read_text()


def test_an_earlier_ca_signs_a_new_server(kit: Path, tmp_path: Path) -> None:
    words = ["site-kit", "--sites", "north", "--server", HOST, "--ca", str(kit / "ca")]
    assert cli.main([*words, "--out", str(tmp_path / "renewed")]) == 0
    shake_hands(tmp_path / "renewed" / "server", kit / "sites" / "north" / "ca.crt", HOST)


def test_a_node_has_a_p384_key_of_its_own(kit: Path) -> None:
    seen = set()
    for site in SITES:
        folder = kit / "sites" / site
        private = load_ssh_private_key((folder / "node.key").read_bytes(), None)
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        assert private.curve.name == "secp384r1"
        registered = (kit / "server" / "keys" / f"{site}.pub").read_bytes()
        assert load_ssh_public_key(registered) == private.public_key()
        assert registered == (folder / "node.pub").read_bytes()
        seen.add(registered.split()[1])
    assert len(seen) == len(SITES)


def test_others_read_nothing_and_no_folder_holds_anothers_secret(kit: Path) -> None:
    for path in (kit, *kit.rglob("*")):
        script = path.is_dir() or path.suffix == ".sh"
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if script else 0o600), path
    secret = {path for path in kit.rglob("*") if path.is_file() and b"PRIVATE" in path.read_bytes()}
    expected = ["ca/ca.key", "server/server.key", *(f"sites/{site}/node.key" for site in SITES)]
    assert secret == {kit / path for path in expected}


def test_the_node_is_started_with_what_its_site_says(kit: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a site"
    shutil.copytree(kit / "sites" / "south-2", folder)
    site = Site.read(folder)
    assert (site.client, site.clients, site.address) == (1, 2, f"{HOST}:8443")
    told = {**vars(site), "host": "2001:db8::7", "data": "/my images", "state": f"{tmp_path}/s t"}
    told["budget"] = "8.5"
    told["min_count"] = 7
    (folder / FILE).write_text(Site(**told).text())
    assert Site.read(folder) == Site(**told)
    said = started(folder / "start.sh", "flower-supernode", tmp_path)
    options = dict(zip(said[::2], said[1::2], strict=True))
    assert parse_config_args([options.pop("--node-config")]) == {
        "partition-id": 1,
        "num-partitions": 2,
        "state-dir": f"{tmp_path}/s t/clients",
        "min-count": 7,
        "data-dir": "/my images",
        "privacy-budget": 8.5,
    }
    assert options == {
        "--superlink": "[2001:db8::7]:8443",
        "--root-certificates": f"{folder}/ca.crt",
        "--auth-supernode-private-key": f"{folder}/node.key",
        "--host": "127.0.0.1",
        "--port": "9094",
    }


def test_the_superlink_listens_on_loopback_with_tls_and_asks_for_keys(tmp_path: Path) -> None:
    kit = Kit(("a",), HOST, superlink_port=8123, state=tmp_path / "s t")
    write_kit(kit, tmp_path / "kit")
    server = tmp_path / "kit" / "server"
    said = started(server / "start.sh", "flower-superlink", tmp_path)
    flags = ["--enable-supernode-auth", "--disable-runtime-dependency-installation"]
    assert [word for word in flags if word in said] == flags
    pairs = [word for word in said if word not in flags]
    assert dict(zip(pairs[::2], pairs[1::2], strict=True)) == {
        "--host": "127.0.0.1",
        "--port": "8123",
        "--database": f"{tmp_path}/s t/state.db",
        "--ssl-ca-certfile": f"{server}/ca.crt",
        "--ssl-certfile": f"{server}/server.crt",
        "--ssl-keyfile": f"{server}/server.key",
    }


@pytest.mark.parametrize(
    ("own", "program"), [("sites/a", "flower-supernode"), ("server", "flower-superlink")]
)
def test_an_app_whose_unpacking_was_cut_short_is_unpacked_again(
    own: str, program: str, tmp_path: Path
) -> None:
    """Flower's installer believes in a folder that is there, whatever is missing in it."""
    state = tmp_path / "s t"
    write_kit(Kit(("a",), HOST, place=None, state=state), tmp_path / "kit")
    site = tmp_path / "kit" / "sites" / "a"
    (site / FILE).write_text(replace(Site.read(site), state=str(state)).text())
    apps = state / "flower" / "apps"
    half = apps / "pfedmoap.pfedmoap-flwr.0.1.0.a1b2c3d4"
    another = apps / "somebody.else.1.0.0.a1b2c3d4"
    for app in (half, another):
        app.mkdir(parents=True)
        (app / "pyproject.toml").touch()
    started(tmp_path / "kit" / own / "start.sh", program, tmp_path)
    assert list(apps.iterdir()) == [another]


def started(script: Path, program: str, folder: Path) -> list[str]:
    """Return what a start script gives its program, here one that only says it."""
    (folder / "bin").mkdir()
    (folder / "bin" / program).write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (folder / "bin" / program).chmod(0o755)
    environment = {"PATH": f"{folder / 'bin'}:/usr/bin:/bin"}
    done = subprocess.run([script], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_starts_again_for_ever_under_its_own_user(unit: str, kit: Path) -> None:
    read = configparser.ConfigParser(interpolation=None)
    read.optionxform = str  # type: ignore[assignment, method-assign]
    read.read_string((kit / unit).read_text())
    service = read["Service"]
    assert read["Unit"]["StartLimitIntervalSec"] == "0"
    assert (service["Restart"], service["User"], service["UMask"]) == ("always", "pfedmoap", "0077")
    assert service["ExecStart"] == "/etc/pfedmoap/start.sh"
    # A SuperNode's key is refused until its killed predecessor is forgotten, after about 60 s
    assert service["RestartSec"] == ("70" if "supernode" in unit else "5")


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd here")
@pytest.mark.parametrize("unit", UNITS)
def test_systemd_understands_a_unit(unit: str, kit: Path, tmp_path: Path) -> None:
    # Its program lies elsewhere here
    text = (kit / unit).read_text().replace("/etc/pfedmoap/start.sh", "/bin/true")
    (tmp_path / Path(unit).name).write_text(text)
    verify = ["systemd-analyze", "verify", str(tmp_path / Path(unit).name)]
    done = subprocess.run(verify, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    assert "pfedmoap" not in done.stderr


def test_the_proxy_passes_on_the_nodes_requests_alone(kit: Path) -> None:
    text = (kit / "server" / "nginx.conf").read_text()
    passing = {path for path, body in locations(text).items() if "proxy_pass" in body}
    assert passing == {"/v1/fleet/"}
    assert closed(locations(text)["/"])
    assert "listen 8443 ssl;" in text
    size = re.search(r"client_max_body_size (\d+)m;", text)
    assert size
    assert 5 * 1.2 < int(size[1]) < 100


def test_in_compose_the_proxys_port_alone_is_open(kit: Path) -> None:
    services = yaml.safe_load((kit / "server" / "compose.yaml").read_text())["services"]
    assert services["superlink"]["ports"] == ["8443:8443"]
    assert services["nginx"]["network_mode"] == "service:superlink"
    node = yaml.safe_load((kit / "sites" / "north" / "compose.yaml").read_text())["services"]
    assert "ports" not in node["supernode"]


def test_a_readme_has_six_lines(kit: Path) -> None:
    for readme in kit.rglob("README.md"):
        assert len(readme.read_text().splitlines()) == 6


# Wrong use

GOOD = {"--sites": "a,b", "--server": HOST}
LONG = "a" * 33


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"--sites": "a,b c"}, "'b c' is no name of a site"),
        ({"--sites": "../a"}, "'../a' is no name of a site"),
        ({"--sites": "a,,b"}, "'' is no name of a site"),
        ({"--sites": LONG}, f"'{LONG}' is no name of a site"),
        ({"--sites": ""}, "name at least one site"),
        ({"--sites": "a,b,a"}, "a is named twice"),
        ({"--server": "https://fl.example.org"}, "is no host name or IP address"),
        ({"--server": "fl.example.org:8443"}, "is no host name or IP address"),
        ({"--server": "300.1.1.1"}, "is no host name or IP address"),
        ({"--server": "0.0.0.0"}, "is no host name or IP address"),
        ({"--server": "fl.example.org;"}, "is no host name or IP address"),
        ({"--ca": "/no/such/ca"}, "no ca.crt with its ca.key there"),
        ({"--port": "0"}, "is not in the range"),
        ({"--port": "8000"}, "is the SuperLink's own on the server"),
        ({"--place": "/a folder"}, "letters, digits and ._/- alone"),
    ],
)
def test_wrong_use_is_one_line_and_writes_nothing(
    words: dict[str, str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pairs = {**GOOD, "--out": str(tmp_path / "kit"), **words}
    assert cli.main(["site-kit", *(word for pair in pairs.items() for word in pair)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
    assert not list(tmp_path.iterdir())


def test_a_ca_with_another_ones_key_is_refused(kit: Path, tmp_path: Path) -> None:
    write_kit(Kit(("a",), HOST), tmp_path / "other")
    shutil.copy(kit / "ca" / "ca.key", tmp_path / "other" / "ca" / "ca.key")
    words = ["site-kit", "--sites", "a", "--server", HOST, "--out", str(tmp_path / "new")]
    assert cli.main([*words, "--ca", str(tmp_path / "other" / "ca")]) == 2
    assert not (tmp_path / "new").exists()


def test_what_is_there_is_not_overwritten(
    kit: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for path in kit.rglob("*") if path.is_file()}
    words = ["site-kit", "--sites", "a", "--server", HOST, "--out"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for out in (kit, tmp_path / "empty", tmp_path / "dangling"):
        assert cli.main([*words, str(out)]) == 2
        assert f"--out {out} exists already" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in kit.rglob("*") if path.is_file()} == before


def test_a_kit_that_cannot_be_finished_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(site: str) -> tuple[bytes, bytes]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pfedmoap_flwr.deploy.kit.node_pair", full)
    with pytest.raises(UsageError, match="kit cannot be made: No space left"):
        write_kit(Kit(("a",), HOST), tmp_path / "kit")
    assert not list(tmp_path.iterdir())
