"""The second door: a SuperLink and two SuperNodes as real processes, started by the kit's scripts.

TLS and node keys, on loopback; where nginx is installed, everything of the nodes passes through it.
"""

import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pfedmoap_flwr import config, methods
from pfedmoap_flwr.deploy.kit import CONNECTION, Kit, write_kit
from pfedmoap_flwr.engines.in_process import run_in_process
from pfedmoap_flwr.engines.simulation import free_port
from pfedmoap_flwr.runs import checkpoint
from pfedmoap_flwr.runs.folder import RunFolder
from pfedmoap_flwr.runs.record import Round
from support.deployed import CLIENTS, TWO_CLIENTS, Deployed, DeployedRun
from support.deployment import processes, stop
from support.federation import Federate
from support.proxy import NGINX

pytestmark = pytest.mark.processes

SETTINGS: dict[str, Any] = {**TWO_CLIENTS, "eval-every": 2}
GATE = "gate.query.weight"
READINGS = {"pfedla": "tokens", "pfedpt": "pixels"}
"""A method for everything that can be read of an image, besides the features of pFedMoAP."""


STRANGERS = ("unregistered", "keyless", "plaintext")


@dataclass(frozen=True)
class Session:
    """What deployed runs left: two rounds, both SuperNodes restarted, a third round.

    Then two runs of other methods at once, and meanwhile strangers who tried to get in.
    strangers: how each ended; None is trying still.
    nodes: what the SuperLink listed at the end. outside: how `flwr list` ended at the nodes' port.
    """

    statuses: list[str]
    first_rounds: list[Round]
    run: RunFolder
    server_home: Path
    node_states: list[Path]
    reference: RunFolder
    readings: dict[str, DeployedRun]
    again: str
    strangers: dict[str, int | None]
    nodes: list[dict[str, str]]
    outside: int


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """Run two rounds, restart both SuperNodes, resume for a third one; and the same in process."""
    root = tmp_path_factory.mktemp("deploy")
    with processes(root) as started:
        deployed = Deployed(started, CLIENTS)
        assert deployed.register() == [f"{site}: registered before" for site in deployed.sites]
        run_dir = deployed.server_home / "run"
        nodes = deployed.start_nodes()
        first = {**SETTINGS, "run-dir": str(run_dir)}
        statuses = [started.flwr_run(CONNECTION, first, run_dir)]
        first_rounds = RunFolder(run_dir).rounds()
        stop(nodes)
        deployed.start_nodes()
        resumed = {**SETTINGS, "resume": str(run_dir), "num-server-rounds": 3}
        statuses.append(started.flwr_run(CONNECTION, resumed, run_dir))
        strangers = start_strangers(deployed)
        readings = {
            name: deployed.run(name, **{**SETTINGS, "method": name, "num-server-rounds": 1})
            for name in READINGS
        }
        for run in readings.values():
            assert run.wait() == 0, run.said()
        again = deployed.run(next(iter(READINGS)), **SETTINGS)
        assert again.wait() == 2
        ended = {name: process.poll() for name, process in strangers.items()}
        listed = deployed.nodes()
        outside = started.run(["flwr", "list", "outside"], check=False).returncode
    reference = run_reference(root / "reference")
    states = [home / "clients" for home in deployed.homes]
    return Session(
        *(statuses, first_rounds, RunFolder(run_dir), deployed.server_home, states, reference),
        *(readings, again.said(), ended, listed, outside),
    )


def start_strangers(deployed: Deployed) -> dict[str, subprocess.Popen[bytes]]:
    """Start SuperNodes that have what anybody may have: the address and the CA's certificate."""
    root = deployed.root
    write_kit(Kit(("stranger",), "127.0.0.1"), root / "other")
    trust = ["--root-certificates", str(root / "kit" / "server" / "ca.crt")]
    key = str(root / "other" / "sites" / "stranger" / "node.key")
    options = [[*trust, "--auth-supernode-private-key", key], trust, ["--insecure"]]
    found = {}
    for name, option in zip(STRANGERS, options, strict=True):
        command = ["flower-supernode", "--superlink", f"127.0.0.1:{deployed.open_port}", *option]
        command += ["--port", str(free_port()), "--node-config"]
        command += [f'partition-id=0 num-partitions={CLIENTS} state-dir="{root / name}"']
        found[name] = deployed.started.start(name, command)
    return found


def run_reference(run_dir: Path) -> RunFolder:
    """Run the same three rounds without interruption in this process."""
    places = {"run-dir": str(run_dir), "state-dir": str(run_dir / "clients")}
    settings = config.parse({**SETTINGS, **places, "num-server-rounds": 3})
    run_in_process(settings)
    return RunFolder(run_dir)


def assert_same_numbers(deployed: list[Round], expected: list[Round]) -> None:
    """Every accuracy of every client, and the training loss, which also shows a lost gate."""
    assert [replace(r, seconds=0.0, memory={}) for r in deployed] == [
        replace(r, seconds=0.0, memory={}) for r in expected
    ]


def test_6_two_rounds_equal_in_process(session: Session) -> None:
    assert session.statuses[0] == "finished:completed"
    assert not any(record.failed for record in session.first_rounds)
    assert [record.round for record in session.first_rounds] == [0, 1, 2]
    assert_same_numbers(session.first_rounds, session.reference.rounds()[:3])


def test_a_restarted_node_finds_its_gate(session: Session) -> None:
    assert session.statuses[1] == "finished:completed"
    rounds = session.run.rounds()
    assert [record.round for record in rounds] == [0, 1, 2, 3]
    assert_same_numbers(rounds, session.reference.rounds())
    for client in range(len(session.node_states)):
        deployed = load_file(head_file(session, client))
        kept = session.reference.path / "clients" / session.reference.run_id / f"client-{client}"
        for name, tensor in load_file(kept / "round-00003.safetensors").items():
            assert torch.equal(deployed[name], tensor), name


@pytest.mark.parametrize("name", READINGS)
def test_6_two_runs_at_once_with_other_readings_equal_in_process(
    name: str, session: Session, federate: Federate
) -> None:
    assert methods.load(name).reading.kind == READINGS[name]
    expected = federate(flat={**SETTINGS, "method": name, "num-server-rounds": 1})
    assert_same_numbers(session.readings[name].folder.rounds(), expected.rounds())


def test_a_run_in_the_folder_of_another_is_refused(session: Session) -> None:
    assert "holds a run already; give another folder" in session.again.splitlines()[-1]


@pytest.mark.parametrize("name", STRANGERS)
def test_a_stranger_is_refused(name: str, session: Session) -> None:
    """Ended with an error, or trying for ever without TLS; not listed, and never given work."""
    assert session.strangers[name] != 0
    assert session.strangers[name] is not None or (name == "plaintext" and not NGINX)
    assert {node["status"] for node in session.nodes} == {"online"}
    assert len(session.nodes) == CLIENTS
    assert not (session.server_home.parent / name).exists()
    for run in (session.run, *(run.folder for run in session.readings.values())):
        assert not any(record.failed for record in run.rounds())
        assert set(run.rounds()[-1].clients) == set(range(CLIENTS))


@pytest.mark.skipif(not NGINX, reason="no nginx here: the Control API is at the nodes' port")
def test_nobody_commands_from_outside(session: Session) -> None:
    assert session.outside != 0


def test_a_gate_never_leaves_its_node(session: Session) -> None:
    server = checkpoint.load(session.run.path)
    assert server.shared.keys() == {"ctx"}
    for client, state in enumerate(session.node_states):
        files = [path for path in state.rglob("*") if path.is_file()]
        assert {path.parent.name for path in files} == {f"client-{client}"}
        # A part of the gate, too short to be torn by a database's pages
        gate = load_file(head_file(session, client))[GATE].numpy().tobytes()[:256]
        uploaded = server.pool[client]["ctx"].numpy().tobytes()[:256]
        assert holders(uploaded, session.server_home), "the search finds what is there"
        assert not holders(gate, session.server_home)
        others = [other for other in session.node_states if other != state]
        assert not [path for other in others for path in holders(gate, other)]


def head_file(session: Session, client: int) -> Path:
    """Return the file of a client's head after round 3; its node's disk holds other runs' too."""
    heads = session.node_states[client] / session.run.run_id / f"client-{client}"
    return heads / "round-00003.safetensors"


def holders(content: bytes, folder: Path) -> list[Path]:
    """Return the files below a folder that hold some bytes."""
    return [path for path in folder.rglob("*") if path.is_file() and content in path.read_bytes()]
