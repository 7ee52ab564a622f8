"""The second door: a SuperLink and two SuperNodes as real processes, insecure, on loopback."""

import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pfedmoap_flwr import config
from pfedmoap_flwr.engines.in_process import run_in_process
from pfedmoap_flwr.engines.simulation import free_port
from pfedmoap_flwr.runs import checkpoint
from pfedmoap_flwr.runs.folder import RunFolder
from pfedmoap_flwr.runs.record import Round
from support.deployment import Processes, processes, stop, wait_for_port
from support.tiny import TINY

pytestmark = pytest.mark.processes

CLIENTS = 2
SETTINGS: dict[str, Any] = {
    **TINY,
    "data.num-clients": CLIENTS,
    "data.partition": "pathological",
    "data.shots": 4,
    "local-epochs": 1,
}
GATE = "gate.query.weight"


@dataclass(frozen=True)
class Session:
    """What two deployed runs left: two rounds, both SuperNodes restarted, a third round."""

    statuses: list[str]
    first_rounds: list[Round]
    run: RunFolder
    server_home: Path
    node_states: list[Path]
    reference: RunFolder


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """Run two rounds, restart both SuperNodes, resume for a third one; and the same in process."""
    root = tmp_path_factory.mktemp("deploy")
    server_home = root / "server"
    run_dir = server_home / "run"
    node_states = [root / f"node-{client}" / "state" for client in range(CLIENTS)]
    server_home.mkdir()
    port = free_port()
    with processes(root) as started:
        (root / "flower" / "config.toml").write_text(
            f'[superlink.dep]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        )
        superlink = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port)]
        superlink += ["--database", str(server_home / "state.db")]
        started.start("superlink", [*superlink, "--disable-runtime-dependency-installation"])
        wait_for_port(port)
        statuses = []
        nodes = start_nodes(started, port, node_states)
        statuses.append(started.flwr_run("dep", {**SETTINGS, "run-dir": str(run_dir)}, run_dir))
        first_rounds = RunFolder(run_dir).rounds()
        stop(nodes)
        start_nodes(started, port, node_states)
        resumed = {**SETTINGS, "resume": str(run_dir), "num-server-rounds": 3}
        statuses.append(started.flwr_run("dep", resumed, run_dir))
    reference = run_reference(root / "reference")
    return Session(statuses, first_rounds, RunFolder(run_dir), server_home, node_states, reference)


def start_nodes(
    started: Processes, superlink_port: int, states: list[Path]
) -> list[subprocess.Popen[bytes]]:
    """Start one SuperNode per client, each with its own partition, port and state folder."""
    nodes = []
    for client, state in enumerate(states):
        command = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{superlink_port}"]
        command += ["--port", str(free_port()), "--node-config"]
        command += [f'partition-id={client} num-partitions={CLIENTS} state-dir="{state}"']
        nodes.append(started.start(f"supernode-{client}", command))
    return nodes


def run_reference(run_dir: Path) -> RunFolder:
    """Run the same three rounds without interruption in this process."""
    places = {"run-dir": str(run_dir), "state-dir": str(run_dir / "clients")}
    settings = config.parse({**SETTINGS, **places, "num-server-rounds": 3})
    run_in_process(settings)
    return RunFolder(run_dir)


def assert_same_numbers(deployed: list[Round], expected: list[Round]) -> None:
    """Every accuracy of every client, and the training loss, which also shows a lost gate."""
    assert [replace(r, seconds=0.0) for r in deployed] == [
        replace(r, seconds=0.0) for r in expected
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
    for client, state in enumerate(session.node_states):
        deployed = load_file(
            state / session.run.run_id / f"client-{client}" / "round-00003.safetensors"
        )
        kept = session.reference.path / "clients" / session.reference.run_id / f"client-{client}"
        for name, tensor in load_file(kept / "round-00003.safetensors").items():
            assert torch.equal(deployed[name], tensor), name


def test_a_gate_never_leaves_its_node(session: Session) -> None:
    server = checkpoint.load(session.run.path)
    assert server.shared.keys() == {"ctx"}
    for client, state in enumerate(session.node_states):
        files = [path for path in state.rglob("*") if path.is_file()]
        assert {path.parent.name for path in files} == {f"client-{client}"}
        # A part of the gate, too short to be torn by a database's pages
        gate = load_file(files[0])[GATE].numpy().tobytes()[:256]
        uploaded = server.pool[client]["ctx"].numpy().tobytes()[:256]
        assert holders(uploaded, session.server_home), "the search finds what is there"
        assert not holders(gate, session.server_home)
        others = [other for other in session.node_states if other != state]
        assert not [path for other in others for path in holders(gate, other)]


def holders(content: bytes, folder: Path) -> list[Path]:
    """Return the files below a folder that hold some bytes."""
    return [path for path in folder.rglob("*") if path.is_file() and content in path.read_bytes()]
