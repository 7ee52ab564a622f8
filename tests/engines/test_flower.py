"""The app through Flower's own doors: the bundle, `pfedmoap run --engine ray`, plain `flwr run`."""

import json
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from pfedmoap_flwr.engines.simulation import free_port
from pfedmoap_flwr.engines.watchdog import MARK
from pfedmoap_flwr.runs.folder import RunFolder
from support.deployment import (
    APP,
    POLL_SECONDS,
    RUN_SECONDS,
    processes,
)
from support.federation import Federate, content, rounds
from support.tiny import NUM_CLIENTS, TINY

pytestmark = pytest.mark.processes

PFEDMOAP = [sys.executable, "-m", "pfedmoap_flwr.cli"]
RAY = [*PFEDMOAP, "run", "--engine", "ray"]
STOP_SECONDS = 300.0
KILL_SECONDS = 60.0
CLIENTS = 5
EMBEDDED: dict[str, Any] = {
    "data.num-clients": CLIENTS,
    "data.shots": 2,
    "num-server-rounds": 2,
    "local-epochs": 1,
    "device": "cpu",
}


def words(settings: dict[str, Any], run_dir: Path) -> list[str]:
    """Return settings as the command line takes them."""
    return [f"{key}={value}" for key, value in {**settings, "run-dir": run_dir}.items()]


@pytest.fixture(scope="module")
def embedded_in_process(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Two rounds on the embedded CLIP and images, in one process."""
    folder = tmp_path_factory.mktemp("in-process")
    with processes(folder, PFEDMOAP_ASSETS=None) as started:
        run_dir = folder / "run"
        started.run([*PFEDMOAP, "run", *words(EMBEDDED, run_dir)])
    return RunFolder(run_dir)


def assert_same_numbers(run: RunFolder, expected: RunFolder) -> None:
    """Law 6: the same clients, rounds, losses and accuracies, to the last digit; nobody failed."""
    assert not any(record.failed for record in run.rounds())
    assert set(run.rounds()[-1].clients) == set(range(CLIENTS))
    assert rounds(run) == rounds(expected)
    kept = [content(r.path / "checkpoint.safetensors", r) for r in (run, expected)]
    assert kept[0] == kept[1]


def test_6_ray_equals_in_process(embedded_in_process: RunFolder, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with processes(tmp_path, PFEDMOAP_ASSETS=None) as started:
        done = started.run([*RAY, *words(EMBEDDED, run_dir)])
        assert not started.left_behind()
    assert "round 2/2" in done.stdout
    assert_same_numbers(RunFolder(run_dir), embedded_in_process)
    commits = [
        json.loads((folder / "environment.json").read_text())["commit"]
        for folder in (run_dir, embedded_in_process.path)
    ]
    assert commits[0] == commits[1]


def test_plain_flwr_run_finds_the_embedded_assets(
    embedded_in_process: RunFolder, tmp_path: Path
) -> None:
    """Its bundle holds no binary file, its SuperLink is detached: all is found all the same."""
    run_dir = tmp_path / "run"
    settings = {**EMBEDDED, "run-dir": str(run_dir), "state-dir": str(tmp_path / "state")}
    ports = {
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
        "FLWR_LOCAL_CONTROL_API_PORT": str(free_port()),
    }
    no_installation = {"FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1"}
    with processes(tmp_path, PFEDMOAP_ASSETS=None, **ports, **no_installation) as started:
        federation = f"num-supernodes={CLIENTS} client-resources-num-cpus=1"
        status = started.flwr_run("local", settings, run_dir, "--federation-config", federation)
    assert status == "finished:completed"
    assert_same_numbers(RunFolder(run_dir), embedded_in_process)


def test_bundle_holds_the_app_and_no_binary(tmp_path: Path) -> None:
    with processes(tmp_path) as started:
        started.run(["flwr", "build", "--app", str(APP)])
    (bundle,) = tmp_path.glob("*.fab")
    names = zipfile.ZipFile(bundle).namelist()
    assert {"server_app.py", "client_app.py", "pfedmoap_flwr/federation/client.py"} <= set(names)
    assert not [name for name in names if name.endswith((".safetensors", ".parquet", ".npy"))]
    assert not [name for name in names if b"\0" in zipfile.ZipFile(bundle).read(name)]


def test_failing_clients_are_shown_and_the_command_fails(tmp_path: Path) -> None:
    """The clients cannot write their state: their folder is a file."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "clients").write_text("not a folder")
    with processes(tmp_path) as started:
        done = started.run([*RAY, *words(TINY, run_dir)], check=False)
        assert not started.left_behind()
    assert done.returncode == 1
    said = "the trained head cannot be written (Not a directory); the head of before is kept"
    assert said in done.stderr
    assert "pfedmoap: the run failed" in done.stderr


def test_ctrl_c_ends_everything_and_the_run_goes_on(tmp_path: Path, federate: Federate) -> None:
    folder = RunFolder(tmp_path / "run")
    endless = words({**TINY, "num-server-rounds": 10_000}, folder.path)
    with processes(tmp_path) as started:
        command = started.start("command", [*RAY, *endless])
        wait_for_rounds(folder, 2, command)
        command.send_signal(signal.SIGINT)
        assert command.wait(STOP_SECONDS) == 130
        assert not started.left_behind()
        last = folder.rounds()[-1].round + 1
        resume = [f"resume={folder.path}", f"num-server-rounds={last}"]
        started.run([*PFEDMOAP, "run", *resume])
    assert [record.round for record in folder.rounds()] == list(range(last + 1))
    whole = federate("whole", num_server_rounds=last)
    assert set(whole.rounds()[-1].clients) == set(range(NUM_CLIENTS))
    assert rounds(folder) == rounds(whole)


def test_a_killed_command_leaves_no_process_behind(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    endless = words({**TINY, "num-server-rounds": 10_000}, folder.path)
    with processes(tmp_path) as started:
        command = started.start("command", [*RAY, *endless])
        wait_for_rounds(folder, 0, command)
        marked = (process.environ().get(MARK) for process in started.alive())
        (home,) = {Path(mark) for mark in marked if mark}
        assert home.is_dir()
        command.send_signal(signal.SIGKILL)
        command.wait(STOP_SECONDS)
        assert started.alive()
        assert not started.left_behind(KILL_SECONDS)
    assert not home.exists()


def wait_for_rounds(folder: RunFolder, count: int, command: subprocess.Popen[bytes]) -> None:
    """Wait until a running command has written so many rounds after the first evaluation."""
    deadline = time.monotonic() + RUN_SECONDS
    while time.monotonic() < deadline and command.poll() is None:
        if len(folder.rounds()) > count:
            return
        time.sleep(POLL_SECONDS)
    raise AssertionError(f"the command ended ({command.poll()}) or wrote no {count} rounds")
