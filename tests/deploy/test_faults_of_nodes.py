"""Real processes over TLS with node keys: nodes and their clients die, strangers come."""

import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from pfedmoap_flwr.deploy import keys
from pfedmoap_flwr.deploy.kit import Kit, write_kit
from pfedmoap_flwr.engines.simulation import free_port
from pfedmoap_flwr.runs.record import Round
from support.deployed import CLIENTS, TWO_CLIENTS, Deployed, DeployedRun
from support.deployment import processes, wait_for_port
from support.federation import run_tiny

pytestmark = pytest.mark.processes

BROKEN, WELL = 0, 1
ROUNDS = 4
SETTINGS: dict[str, Any] = {
    **TWO_CLIENTS,
    "num-server-rounds": ROUNDS,
    "eval-every": ROUNDS,
    # The killed node's message is lost without a word where Flower lets the node in again before
    # the server has asked
    "node-timeout": 240,
}
REFUSED_SECONDS = 60.0
Record = Callable[[str, object], None]


@dataclass(frozen=True)
class Faulty:
    """A run in which a client's process dies in round 1, and its SuperNode in round 2."""

    run: DeployedRun
    status: int
    client_log: str


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """A SuperLink and the SuperNode of one site; the other's is started by who kills it."""
    with processes(tmp_path_factory.mktemp("deployed")) as started:
        deployed = Deployed(started, CLIENTS)
        deployed.start_node(WELL)
        yield deployed


@contextmanager
def kept_up(
    deployed: Deployed, client: int, pause: float
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start a SuperNode whenever it is not there, as its unit does; yield all that were started."""
    nodes = [deployed.start_node(client)]
    over = threading.Event()

    def keep() -> None:
        while not over.wait(0.2):
            if nodes[-1].poll() is not None and not over.wait(pause):
                nodes.append(deployed.start_node(client))

    thread = threading.Thread(target=keep)
    thread.start()
    try:
        yield nodes
    finally:
        over.set()
        thread.join()
        nodes[-1].terminate()
        nodes[-1].wait()


@pytest.fixture(scope="module")
def faulty(deployed: Deployed) -> Faulty:
    """Let both faults happen, and wait for the end of the run."""
    with kept_up(deployed, BROKEN, pause=2) as nodes:
        run = deployed.run("faulty", **SETTINGS)
        run.wait_for_round(0)
        deployed.wait_for_member("flwr-clientapp", nodes[-1], run.next_began()).kill()
        run.wait_for_round(1)
        deployed.wait_for_member("flwr-clientapp", nodes[-1], run.next_began())
        nodes[-1].kill()
        status = run.wait()
    log = (deployed.root / f"supernode-{BROKEN}.log").read_text()
    return Faulty(run, status, log)


def seconds_off(records: Sequence[Round]) -> list[Round]:
    """Return what rounds say, apart from the time they took."""
    return [replace(record, seconds=0, memory={}) for record in records]


def test_a_killed_client_process_is_replaced_and_nothing_changes(
    faulty: Faulty, tmp_path: Path, record_property: Record
) -> None:
    expected = run_tiny(tmp_path / "run", flat=SETTINGS)
    record_property("seconds of the round", faulty.run.folder.rounds()[1].seconds)
    assert seconds_off(faulty.run.folder.rounds()[:2]) == seconds_off(expected.rounds()[:2])


def test_a_killed_node_is_missed_for_a_round_and_comes_back(
    faulty: Faulty, record_property: Record
) -> None:
    records = faulty.run.folder.rounds()
    record_property("seconds of rounds 2 to 4", [round(r.seconds, 1) for r in records[2:]])
    record_property("said", faulty.run.said())
    record_property("failed", [r.failed for r in records])
    assert faulty.status == 0, faulty.run.said()
    assert records[2].failed.keys() == {BROKEN}
    assert not any(WELL in record.failed for record in records)
    # With the head of before: its log would say that one is gone
    assert BROKEN in records[ROUNDS].bytes_up
    assert records[ROUNDS].clients.keys() == {BROKEN, WELL}
    assert "is gone" not in faulty.client_log


def test_anothers_key_and_another_ca_and_an_expired_certificate_are_refused(
    deployed: Deployed, record_property: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each node ends by itself and says why; the one whose key was used stays."""
    root = deployed.root
    write_kit(Kit(("a",), "127.0.0.1"), root / "another")
    monkeypatch.setattr(keys, "SERVER_DAYS", 0)
    write_kit(Kit(("a",), "127.0.0.1", place=None), root / "old", root / "kit" / "ca")
    old = free_port()
    server = root / "old" / "server"
    text = (server / "server.env").read_text()
    lines = [f'STATE="{root / "old-state"}"', f"PORT={old}"]
    others = [line for line in text.splitlines() if not line.startswith(("STATE=", "PORT="))]
    (server / "server.env").write_text("\n".join([*lines, *others]) + "\n")
    deployed.started.start("old", [str(server / "start.sh")])
    wait_for_port(old)
    trust, key = deployed.site_folder(WELL) / "ca.crt", deployed.site_folder(WELL) / "node.key"
    tried = {
        "anothers-key": (deployed.open_port, trust, "failed to activate supernode"),
        "another-ca": (deployed.open_port, root / "another" / "ca" / "ca.crt", "certificate"),
        "expired": (old, trust, "certificate"),
    }
    began, nodes = time.monotonic(), {}
    for name, (port, ca, _) in tried.items():
        command = ["flower-supernode", "--superlink", f"127.0.0.1:{port}"]
        command += ["--root-certificates", str(ca), "--auth-supernode-private-key", str(key)]
        command += ["--port", str(free_port()), "--node-config", "partition-id=0"]
        nodes[name] = deployed.started.start(name, command)
    for name, (_, _, said) in tried.items():
        assert nodes[name].wait(REFUSED_SECONDS) != 0, name
        record_property(f"seconds {name}", round(time.monotonic() - began, 1))
        log = (root / f"{name}.log").read_text()
        record_property(f"said {name}", log[-600:])
        assert said in log.lower(), log
    assert [node["status"] for node in deployed.nodes()].count("online") == 1
