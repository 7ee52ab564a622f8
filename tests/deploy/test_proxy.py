"""nginx itself with the kit's configuration, before a server that says what reached it."""

import http.client
import inspect
import re
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from flwr.supercore.control import ControlHttpClient
from flwr.supernode.fleet_http_client import FleetHttpClient

from pfedmoap_flwr.deploy.kit import Kit, write_kit
from pfedmoap_flwr.engines.simulation import free_port
from support.proxy import NGINX, nginx_command

needs_nginx = pytest.mark.skipif(not NGINX, reason="no nginx here")


def paths(client: type) -> list[str]:
    """What a client of Flower's asks for, by its source."""
    return re.findall(r'path="([^"]+)"', inspect.getsource(client))


def test_flowers_nodes_ask_for_what_is_passed_on_and_its_users_for_what_is_not() -> None:
    fleet, control = paths(FleetHttpClient), paths(ControlHttpClient)
    assert len(fleet) > 5
    assert len(control) > 5
    assert all(path.startswith("/v1/fleet/") for path in fleet)
    assert not [path for path in control if path.startswith("/v1/fleet/")]


class SayingPath(BaseHTTPRequestHandler):
    """A SuperLink that answers every request with its path."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        body = f"{self.path} {self.headers['flwr-signature']}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Ask"]:
    """nginx in front of such a server; the function asks it as somebody outside would."""
    folder = tmp_path_factory.mktemp("proxy")
    server = folder / "kit" / "server"
    # Any free port for the upstream: the kit must know it before
    kit = Kit(("a",), "127.0.0.1", free_port(), free_port(), place=None)
    write_kit(kit, folder / "kit")
    upstream = ThreadingHTTPServer(("127.0.0.1", kit.superlink_port), SayingPath)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server / "server.crt", server / "server.key")
    upstream.socket = context.wrap_socket(upstream.socket, server_side=True)
    threading.Thread(target=upstream.serve_forever, daemon=True).start()
    command = nginx_command(server, folder)
    nginx = subprocess.Popen(command)
    try:
        asking = Ask(kit.port, folder / "kit" / "sites" / "a" / "ca.crt")
        asking.wait()
        yield asking
    finally:
        nginx.terminate()
        nginx.wait(10)
        upstream.shutdown()


class Ask:
    """Asks over TLS, trusting the site's CA, with a path that nobody tidies up first."""

    def __init__(self, port: int, ca: Path) -> None:
        self.port = port
        self.trust = ssl.create_default_context(cafile=str(ca))

    def __call__(self, path: str, method: str = "POST", body: bytes = b"x") -> tuple[int, str]:
        connection = http.client.HTTPSConnection(
            "127.0.0.1", self.port, timeout=60, context=self.trust
        )
        try:
            connection.request(method, path, body, {"flwr-signature": "signed"})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def wait(self) -> None:
        """Wait until nginx answers."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                self("/")
            except OSError:
                time.sleep(0.2)
            else:
                return
        raise AssertionError("nginx does not answer")


@needs_nginx
@pytest.mark.parametrize("path", paths(FleetHttpClient))
def test_a_node_gets_through_with_its_signature(path: str, ask: Ask) -> None:
    assert ask(path) == (200, f"{path} signed")


@needs_nginx
@pytest.mark.parametrize(
    "path",
    [
        *paths(ControlHttpClient),
        "/v1/runtime/acquire-task",
        "/docs",
        "/openapi.json",
        "/health",
        "/",
        "/v1/fleet/../control/list-runs",
        "/v1/fleet/%2e%2e/control/list-runs",
        "/v1/fleet/..%2fcontrol/list-runs",
        "/v1/fleet//../control/list-runs",
        "/v1/fleet",
        "/v1/fleets/register-node",
    ],
)
def test_all_else_is_not_there(path: str, ask: Ask) -> None:
    status, said = ask(path)
    assert status in (301, 404)
    assert "signed" not in said


@needs_nginx
def test_what_is_passed_on_begins_as_the_fleet_api_does(ask: Ask) -> None:
    """Whatever way a path is written: nginx compares and passes on one and the same."""
    for path in ("/v1/control/../fleet/get-run", "/v1/control/%2e%2e/fleet/get-run"):
        assert ask(path) == (200, "/v1/fleet/get-run signed")


@needs_nginx
def test_reading_and_large_bodies_are_refused(ask: Ask) -> None:
    assert ask("/v1/fleet/pull-messages", "GET", b"")[0] == 403
    assert ask("/v1/fleet/push-object", body=b"x" * (6 << 20))[0] == 200
    assert ask("/v1/fleet/push-object", body=b"x" * (17 << 20))[0] == 413
