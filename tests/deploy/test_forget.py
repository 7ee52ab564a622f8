"""pfedmoap deploy forget and deploy run: what stays of ended runs, and what wrong use is told."""

import os
import sqlite3
from pathlib import Path

import pytest
from flwr.supercore.state.alembic.utils import get_combined_metadata
from rich.console import Console
from sqlalchemy import create_engine

from pfedmoap_flwr.api import Plan
from pfedmoap_flwr.cli import deploy
from pfedmoap_flwr.cli import main as cli
from pfedmoap_flwr.deploy import submit
from pfedmoap_flwr.deploy.kit import Kit, write_kit
from pfedmoap_flwr.deploy.submit import Server
from pfedmoap_flwr.engines.simulation import flwr
from pfedmoap_flwr.errors import RunFailed
from pfedmoap_flwr.runs.folder import load_settings
from support.federation import Federate

ENDED, AT_WORK = 1, 2
SECRET = {ENDED: b"a prompt that was uploaded" * 9, AT_WORK: b"a prompt of a run at work" * 9}


@pytest.fixture
def server(tmp_path: Path) -> Path:
    """A server's folder of a kit, and Flower's database with a run that ended and one at work."""
    state = tmp_path / "state"
    state.mkdir()
    write_kit(Kit(("a",), "127.0.0.1", place=None, state=state), tmp_path / "kit")
    create_engine_at(state / "state.db")
    return tmp_path / "kit" / "server"


def create_engine_at(path: Path) -> None:
    """Flower's own tables, with a message and an object of each run in them."""
    get_combined_metadata().create_all(create_engine(f"sqlite:///{path}"))
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA journal_mode=WAL")
        for run, ended in ((ENDED, "2026-11-29"), (AT_WORK, None)):
            database.execute("INSERT INTO run (run_id, primary_task_id) VALUES (?, ?)", (run, run))
            database.execute(
                "INSERT INTO task (task_id, type, run_id, pending_at, finished_at) "
                "VALUES (?, 'serverapp', ?, '2026-11-29', ?)",
                (run, run, ended),
            )
            for table in ("message_ins", "message_res"):
                database.execute(
                    f"INSERT INTO {table} (message_id, run_id, content) VALUES (?, ?, ?)",
                    (f"{table} {run}", run, SECRET[run]),
                )
            name = f"object {run}"
            database.execute(
                "INSERT INTO objects (object_id, content) VALUES (?, ?)", (name, SECRET[run])
            )
            database.execute(
                "INSERT INTO run_objects (run_id, object_id) VALUES (?, ?)", (run, name)
            )


def content(server: Path) -> bytes:
    """Return all bytes of the database and its journal."""
    return b"".join(p.read_bytes() for p in (server.parents[1] / "state").glob("state.db*"))


def test_every_byte_of_ended_runs_goes_and_runs_at_work_stay(server: Path) -> None:
    # Open elsewhere, as the SuperLink has it: or else the journal would go with the last reader
    other = sqlite3.connect(server.parents[1] / "state" / "state.db")
    other.execute("SELECT count(*) FROM run").fetchone()
    other.execute("DELETE FROM message_res WHERE run_id = ?", (ENDED,))
    other.commit()
    assert SECRET[ENDED] in content(server)
    assert cli.main(["deploy", "forget", str(server)]) == 0
    assert SECRET[ENDED] not in content(server)
    assert SECRET[AT_WORK] in content(server)
    counts = [
        other.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
        for table in ("run", "message_ins", "message_res", "objects", "run_objects")
    ]
    assert counts == [2, 1, 1, 1, 1]
    other.close()


def test_wrong_use_is_one_line(
    server: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    database = server.parents[1] / "state" / "state.db"
    for words, said in (
        (["forget", str(tmp_path)], "is this a server's folder?"),
        (["run", str(tmp_path)], "is this a server's folder?"),
        (["run", str(server), "local-epoch=1"], "did you mean 'local-epochs'"),
        (["run", str(server), f"resume={tmp_path}"], "no settings.json there"),
    ):
        assert cli.main(["deploy", *words]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert said in error
    database.write_bytes(b"no database" * 99)
    assert cli.main(["deploy", "forget", str(server)]) == 2
    assert "messages cannot be removed" in capsys.readouterr().err


def test_a_run_whose_database_cannot_be_cleaned_is_done_and_says_so(
    server: Path,
    reference: Federate,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = reference(method="promptfl", local_epochs=1, num_server_rounds=1)
    monkeypatch.setattr(submit, "run_through", lambda *_: None)
    (server.parents[1] / "state" / "state.db").write_bytes(b"no database" * 99)
    result = Server(server).run(Plan(load_settings(run.path), run.path), Console())
    assert result.summary == run.summary()
    assert f"try again: pfedmoap deploy forget {server}" in capsys.readouterr().out


def test_what_flwr_refuses_ends_the_run_in_its_words(tmp_path: Path) -> None:
    program = tmp_path / "flwr"
    said = '{"success": false, "error-message": "no SuperLink"}'
    program.write_text(f"#!/bin/sh\necho '{said}'\n")
    program.chmod(0o700)
    with pytest.raises(RunFailed, match=r"^flwr list: no SuperLink$"):
        flwr(["list"], os.environ, str(program))


def test_ctrl_c_says_that_the_run_goes_on(
    server: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(deploy, "run_deployed", interrupted)
    assert cli.main(["deploy", "run", str(server)]) == 130
    assert "the run goes on" in capsys.readouterr().err
