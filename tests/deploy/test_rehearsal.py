"""pfedmoap deploy local: the same numbers as in process, and nothing runs on, however it ends."""

import json
import os
import pty
import re
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pfedmoap_flwr.cli import main as cli
from pfedmoap_flwr.deploy import local
from pfedmoap_flwr.deploy.local import SMALL
from pfedmoap_flwr.errors import RunFailed
from pfedmoap_flwr.runs.folder import RunFolder
from support.copies import write_tree
from support.deployment import RUN_SECONDS, processes
from support.federation import Federate, Federation, rounds
from support.tiny import NUM_CLIENTS, TINY

KILL_SECONDS = 60.0
SETTINGS: dict[str, Any] = {
    **{key: value for key, value in TINY.items() if key != "data.num-clients"},
    "method": "fedrep",
    "num-server-rounds": 1,
}
CLASSES = "cat,dog,red panda"
WORDS = [f"{key}={value}" for key, value in SETTINGS.items()]
LOCAL = [sys.executable, "-m", "pfedmoap_flwr.cli", "deploy", "local"]


@pytest.mark.processes
def test_6_a_rehearsal_of_three_sites_equals_in_process(
    tmp_path: Path, federation: Federation
) -> None:
    # Different sizes, a space in a path, a class that one site lacks
    sites = [tmp_path / "images of 0", tmp_path / "images-of-1", tmp_path / "2"]
    write_tree(sites[0], {"cat": 10, "red_panda": 10})
    write_tree(sites[1], {"cat": 20, "dog": 20, "red_panda": 20})
    write_tree(sites[2], {"cat": 10, "dog": 20, "red_panda": 10})
    run = RunFolder(tmp_path / "deployed")
    with processes(tmp_path, TMPDIR=str(tmp_path / "tmp")) as started:
        (tmp_path / "tmp").mkdir()
        folders = [word for site in sites for word in ("--data", str(site))]
        done = started.run(
            [*LOCAL, *folders, *WORDS, f"data.classnames={CLASSES}", f"run-dir={run.path}"]
        )
        assert not started.left_behind()
    # Each node unpacks the app for itself: none sees it half there
    logs = [(run.path / f"site-{client}.log").read_text() for client in range(len(sites))]
    places = [re.findall(r"Successfully installed pfedmoap-flwr to (\S+)", log) for log in logs]
    assert len({place for (place,) in places}) == len(sites)
    # Neither keys nor Flower's homes
    assert not list((tmp_path / "tmp").glob("pfedmoap-*"))
    own = {"data.name": "folder", "data.classnames": CLASSES}
    expected = federation(sites, **{**SMALL, **SETTINGS, **own})
    assert set(run.rounds()[-1].clients) == {0, 1, 2}
    assert rounds(run) == rounds(expected)
    assert f"{run.summary()['personal_accuracy']:.1%}" in done.stdout
    assert "registered    site-0, site-1, site-2" in done.stdout
    said = json.loads((run.path / "data.json").read_text())
    sizes = {tuple(data["clients"]): data["sizes"]["train"] for data in said}
    assert sizes == {(0,): 14, (1,): 42, (2,): 28}


@pytest.mark.processes
@pytest.mark.parametrize(
    ("number", "started_last"),
    [
        (signal.SIGINT, "site-1.log"),
        (signal.SIGTERM, "flower.log"),
        (signal.SIGHUP, "site-1.log"),
        (signal.SIGKILL, "site-1.log"),
    ],
)
def test_stopped_it_leaves_no_process_and_no_key(
    number: signal.Signals,
    started_last: str,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """At once after a process was started, a node or the SuperLink, which is then half there.

    It writes to a terminal. With SIGHUP that is gone, as when a window is closed or a line drops.
    """
    ours, its = pty.openpty()
    said = b""
    with processes(tmp_path, TMPDIR=str(tmp_path / "tmp")) as started:
        (tmp_path / "tmp").mkdir()
        words = [*LOCAL, *WORDS, f"run-dir={tmp_path / 'run'}"]
        command = started.start("command", words, terminal=its)
        os.close(its)
        log = tmp_path / "run" / started_last
        deadline = time.monotonic() + RUN_SECONDS
        while not log.exists() and command.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(started.alive()) > 1
        if number == signal.SIGHUP:
            os.close(ours)
        command.send_signal(number)
        # As a shell and the kernel both say that a terminal is gone
        with suppress(ProcessLookupError):
            command.send_signal(number)
        stopped = time.monotonic()
        status = command.wait(RUN_SECONDS)
        assert not started.left_behind(KILL_SECONDS)
        record_property("seconds until nothing is left", round(time.monotonic() - stopped, 1))
    # Without a terminal the last line cannot be written, and nobody asks for the status
    assert status in {signal.SIGKILL: (-9,), signal.SIGHUP: (1, 130)}.get(number, (130,))
    assert not list((tmp_path / "tmp").glob("pfedmoap-*"))
    if number in (signal.SIGINT, signal.SIGTERM):
        with suppress(OSError):  # which is how a terminal ends
            while part := os.read(ours, 4096):
                said += part
        assert "nothing of it runs on" in said.decode()


def test_a_rehearsal_that_cannot_go_on_leaves_the_ending_of_before(
    tmp_path: Path, federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(*_: object) -> None:
        raise RunFailed("no SuperLink today")

    run = federate("whole", num_server_rounds=1)
    summary = (run.path / "summary.json").read_bytes()
    monkeypatch.setattr(local, "_start", cannot)
    nodes = ["--nodes", str(NUM_CLIENTS)]
    assert cli.main(["deploy", "local", *nodes, f"resume={run.path}", "num-server-rounds=2"]) == 1
    assert (run.path / "summary.json").read_bytes() == summary


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data.num-clients=4"], "is what --nodes says"),
        (["--nodes", "1"], "not in the range x>=2"),
        (["--data", "/nowhere", "--data", "/nowhere"], "/nowhere: no such folder"),
        (["--data", "/tmp", "--nodes", "3"], "1 folders for 3 nodes"),
        (["state-dir=/tmp"], "is for deployments"),
        (["local-epoch=1"], "did you mean 'local-epochs'"),
    ],
)
def test_wrong_use_starts_nothing(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["deploy", "local", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
