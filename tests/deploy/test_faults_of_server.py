"""Real processes over TLS with node keys: the server's die, and the run goes on by itself."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pfedmoap_flwr.runs import checkpoint
from pfedmoap_flwr.runs.folder import RunFolder
from support.deployed import CLIENTS, TWO_CLIENTS, Deployed
from support.deployment import processes
from support.federation import rounds, run_tiny

pytestmark = pytest.mark.processes

SETTINGS: dict[str, Any] = {**TWO_CLIENTS, "num-server-rounds": 3, "eval-every": 3}
STOP_SECONDS = 30.0
Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """A SuperLink and two SuperNodes, which end soon after SIGTERM, whatever has happened."""
    with processes(tmp_path_factory.mktemp("deployed")) as started:
        deployed = Deployed(started, CLIENTS)
        nodes = deployed.start_nodes()
        yield deployed
        for process in (*nodes, deployed.superlink):
            process.terminate()
        for process in (*nodes, deployed.superlink):
            process.wait(STOP_SECONDS)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The same run without a fault, in this process."""
    return run_tiny(tmp_path_factory.mktemp("expected") / "run", flat=SETTINGS)


def kill_server_app(deployed: Deployed) -> None:
    """End the process that leads the run."""
    (process,) = deployed.members("flwr-serverapp")
    process.kill()


def kill_superlink(deployed: Deployed) -> None:
    """End the SuperLink, and start it again on its database, as its unit does."""
    deployed.superlink.kill()
    deployed.superlink.wait()
    time.sleep(5)  # RestartSec
    deployed.start_superlink()


def test_a_killed_server_goes_on_from_the_last_whole_round_by_itself(
    deployed: Deployed, expected: RunFolder, record_property: Record
) -> None:
    """The run's process is killed in round 2, the SuperLink in round 3."""
    run = deployed.run("killed", "--retry", "2", **SETTINGS)
    for number, kill in enumerate((kill_server_app, kill_superlink), start=1):
        run.wait_for_round(number)
        # In mid-round, when the prompt that was sent is in Flower's database: the search finds it
        sent = checkpoint.load(run.folder.path).shared["ctx"]
        deployed.wait_for_holder(sent.numpy().tobytes()[:256])
        killed = time.monotonic()
        kill(deployed)
        seconds = run.wait_for_round(number + 1) - killed
        record_property(f"{kill.__name__}: seconds to the next round", round(seconds, 1))
    assert run.wait() == 0, run.said()
    record_property("said", run.said())
    assert run.said().count("the run failed: Flower lists the run as finished:failed") == 2
    assert "it goes on from its last whole round; attempts left after this one: 0" in run.said()
    assert rounds(run.folder) == rounds(expected)
    assert not (run.folder.path / "error.txt").exists()
    # Neither in the database nor in its journal, although the SuperLink runs on
    state = checkpoint.load(run.folder.path)
    for prompt in (sent, state.shared["ctx"], *(entry["ctx"] for entry in state.pool.values())):
        assert not deployed.holders(prompt.numpy().tobytes()[:256])
