"""A damaged run folder: what is told, what is gone on from, and that nothing more is lost."""

import functools
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pfedmoap_flwr import api, config, files
from pfedmoap_flwr.comparison import cells
from pfedmoap_flwr.comparison.cells import new_root
from pfedmoap_flwr.engines.in_process import run_in_process
from pfedmoap_flwr.errors import RunFailed, UsageError
from pfedmoap_flwr.federation import server
from pfedmoap_flwr.methods.base import ServerState
from pfedmoap_flwr.runs import checkpoint, place
from pfedmoap_flwr.runs.folder import RunFolder
from support.federation import Federate, assert_same
from support.tiny import TINY

SHORT = {"local_epochs": 1, "batch_size": 16, "method": "promptfl"}
NEWEST, BEFORE = checkpoint.FILE, checkpoint.BEFORE
Reference = Callable[..., RunFolder]


@pytest.fixture
def run(reference: Reference, tmp_path: Path) -> RunFolder:
    """A finished run of three rounds, a copy of its own for the test."""
    folder = reference(num_server_rounds=3, **SHORT).path
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "error.txt").write_text("of before")
    return RunFolder(tmp_path / "run")


def resume(run: RunFolder, rounds: int = 4) -> None:
    api.execute(api.plan({"resume": str(run.path), "num-server-rounds": rounds}))


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def rewritten(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Write the file with another state and a digest that is right again."""
    state = checkpoint.read(path)
    change(state.__dict__)
    other = path.parent / "other"
    other.mkdir()
    checkpoint.save(state, other, RunFolder(path.parent).run_id)
    (other / NEWEST).replace(path)
    other.rmdir()


def infinite(path: Path) -> None:
    tensors = load_file(path)
    tensors["shared/ctx"][0, 0] = torch.inf
    said = {"round": 3, "pool": []}
    digest = checkpoint.digest_of(said, tensors)
    header = {"run": RunFolder(path.parent).run_id, **said, "digest": digest}
    save_file(tensors, path, metadata={"state": json.dumps(header)})


def of_another_run(path: Path) -> None:
    """Of the same settings, and so of the same shapes."""
    own = RunFolder(path.parent).run_id.encode()
    path.write_bytes(path.read_bytes().replace(own, b"0" * 32))


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: path.write_bytes(b""),
    "one bit": flipped,
    "foreign": lambda path: save_file({"weight": torch.ones(3)}, path),
    "no safetensors": lambda path: path.write_bytes(b"PK" * 999),
    "of a round that was not run": lambda path: rewritten(path, lambda s: s.update(round=99)),
    "of round -3": lambda path: rewritten(path, lambda s: s.update(round=-3)),
    "infinite": infinite,
    "of another run": of_another_run,
    "gone": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_costs_its_round_and_is_said(
    damage: str,
    run: RunFolder,
    reference: Reference,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = reference(num_server_rounds=4, **SHORT)
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    DAMAGES[damage](run.path / NEWEST)
    assert checkpoint.load(run.path, range(4), run.run_id).round == 2
    assert f"{NEWEST}: " in caplog.text
    assert "the run goes on from round 2" in caplog.text
    resume(run)
    assert_same(run, whole)


def test_a_resumed_run_says_what_it_went_on_with(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = json.loads((run.path / "environment.json").read_text())
    for number, commit in enumerate(("other", began["commit"])):
        monkeypatch.setattr("pfedmoap_flwr.runs.environment._commit", lambda made=commit: made)
        resume(run, 4 + number)
    now = json.loads((run.path / "environment.json").read_text())
    first, second = now.pop("resumed")
    assert now == began
    assert (first.pop("after_round"), second.pop("after_round")) == (3, 4)
    assert first.pop("started") >= began["started"]
    assert first == {"commit": "other"}
    assert second.keys() == {"started"}


def test_a_damaged_checkpoint_never_becomes_the_one_before(run: RunFolder) -> None:
    flipped(run.path / NEWEST)
    resume(run, 3)
    assert checkpoint.read(run.path / BEFORE).round == 2
    assert checkpoint.read(run.path / NEWEST).round == 3


def test_without_any_checkpoint_one_line_says_what_to_do_and_the_ending_stays(
    run: RunFolder,
) -> None:
    for name in (NEWEST, BEFORE):
        flipped(run.path / name)
    refused_and_left(run, NEWEST, "is not what was written", "from a copy")


def test_the_checkpoints_of_another_run_of_these_shapes_are_refused(run: RunFolder) -> None:
    for name in (NEWEST, BEFORE):
        of_another_run(run.path / name)
    refused_and_left(run, NEWEST, "is another run's", "from a copy")


@pytest.mark.parametrize(
    ("shared", "pool"),
    [
        ({"ctx": torch.ones(5, 32)}, {}),
        ({"weight": torch.ones(4, 32)}, {}),
        ({"ctx": torch.ones(4, 32)}, {4: {"ctx": torch.ones(4, 32)}}),
    ],
    ids=["another length", "another method", "a client too many"],
)
def test_the_checkpoint_of_another_run_is_refused_and_the_ending_stays(
    shared: Any, pool: Any, run: RunFolder
) -> None:
    checkpoint.save(ServerState(shared, pool, round=3), run.path, run.run_id)
    summary = (run.path / "summary.json").read_bytes()
    with pytest.raises(UsageError, match=rf"^{NEWEST} is another run's: [^\n]*$"):
        resume(run)
    assert (run.path / "summary.json").read_bytes() == summary
    assert len(run.rounds()) == 4


def refused_and_left(run: RunFolder, *words: str) -> None:
    """Planning and running both refuse in one line, and all but error.txt is as it was."""
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    settings = {**TINY, "num-server-rounds": 3, "method": "promptfl"}
    settings |= {"local-epochs": 1, "batch-size": 16, "resume": str(run.path)}
    for attempt in (lambda: resume(run), lambda: run_in_process(config.parse(settings))):
        with pytest.raises(UsageError, match=r"^[^\n]*$") as raised:
            attempt()
        assert all(word in str(raised.value) for word in words), raised.value
    after = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    changed = {path.name for path in {*before, *after} if before.get(path) != after.get(path)}
    assert changed <= {"error.txt", place.LOCK}
    assert (run.path / "summary.json").exists()


@pytest.mark.parametrize(
    ("line", "content"),
    [
        (1, b"{"),
        (2, b""),
        (3, b"\0" * 20),
        (2, b"\xff\xfe"),
        (1, b'{"round": 0, "new": 1}'),
        (2, b"[]"),
    ],
)
def test_a_damaged_line_of_rounds_is_named(line: int, content: bytes, run: RunFolder) -> None:
    path = run.path / "rounds.jsonl"
    lines = path.read_bytes().splitlines()
    lines[line - 1] = content
    path.write_bytes(b"\n".join(lines) + b"\n")
    refused_and_left(run, str(path), f"line {line}:", "from a copy, or remove that line")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{\n"seed": 1,\n"lr": 0.0', "line 3: is not JSON"),
        ("", "line 1: is not JSON"),
        ("[1]", "line 1: is no table"),
        ("\0\0", "is not JSON"),
        ('{"seed": "one"}', "setting seed='one': must be a whole number"),
    ],
)
@pytest.mark.parametrize("name", ["settings.json", "environment.json"])
def test_damaged_settings_are_named_with_their_line(
    name: str, content: str, words: str, run: RunFolder
) -> None:
    (run.path / name).write_text(content)
    said = words if name == "settings.json" or "seed='" not in words else "has no run_id"
    refused_and_left(run, str(run.path / name), said, "from a copy")


def test_a_half_last_line_is_dropped_and_said_and_its_round_is_run_again(
    run: RunFolder,
    reference: Reference,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = reference(num_server_rounds=4, **SHORT)
    # A run on this machine keeps Flower's lines from the root logger
    monkeypatch.setattr(logging.getLogger("flwr"), "handlers", [caplog.handler])
    path = run.path / "rounds.jsonl"
    os.truncate(path, path.stat().st_size - 30)
    resume(run)
    assert f"{path}: the last line was cut off and is dropped" in caplog.text
    assert_same(run, whole)


# What cannot be written


@pytest.mark.parametrize(
    ("name", "where"),
    [
        (NEWEST, "pfedmoap_flwr.files.write"),
        (NEWEST, "os.fsync"),
        (NEWEST, "os.replace"),
        ("summary.json", "os.fsync"),
        ("rounds.jsonl", "half a line"),
    ],
)
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(
    name: str,
    where: str,
    federate: Federate,
    reference: Reference,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    whole = reference(num_server_rounds=3, **SHORT)
    grow, replace = files.append_line, files.replace

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    def fills_up(path: Path, content: Any, **more: Any) -> None:
        with monkeypatch.context() as patch:
            if path.name == name and (name != NEWEST or len(rounds()) == 3):
                patch.setattr(where, full)
            replace(path, content, **more)

    def rounds() -> list[Any]:
        return RunFolder(tmp_path / "run").rounds()

    def half_a_line(path: Path, line: str) -> None:
        if len(rounds()) == 2:
            with path.open("a") as file:
                file.write(line[:20])
            full()
        grow(path, line)

    with monkeypatch.context() as patch:
        if name == "rounds.jsonl":
            patch.setattr(files, "append_line", half_a_line)
        else:
            patch.setattr(files, "replace", fills_up)
        with pytest.raises(RunFailed, match=rf"^[^\n]*{name} cannot be written \(No space[^\n]*$"):
            federate("run", num_server_rounds=3, **SHORT)
    run = RunFolder(tmp_path / "run")
    assert "make room there, then go on with resume=" in (run.path / "error.txt").read_text()
    assert checkpoint.load(run.path).round == {NEWEST: 1, "rounds.jsonl": 1}.get(name, 3)
    resume(run, 3)
    assert_same(run, whole)
    assert not (run.path / "error.txt").exists()


def test_a_state_that_is_not_finite_is_not_kept(tmp_path: Path) -> None:
    checkpoint.save(ServerState({"ctx": torch.ones(2)}, round=1), tmp_path, "")
    with pytest.raises(RunFailed, match="round 2 left shared/ctx not finite and is not kept"):
        checkpoint.save(ServerState({"ctx": torch.tensor([torch.nan])}, round=2), tmp_path, "")
    assert checkpoint.load(tmp_path).round == 1


def test_every_exception_of_a_run_leaves_its_reason(
    federate: Federate, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("by chance")

    monkeypatch.setattr(server, "_run", broken)
    with pytest.raises(ZeroDivisionError):
        federate("run", **SHORT)
    said = (tmp_path / "run" / "error.txt").read_text()
    assert said.startswith("Traceback")
    assert said.endswith("ZeroDivisionError: by chance\n")


# Where a run lies


@pytest.mark.parametrize(
    "name",
    ["file", "file/below", "/proc/x", "x" * 5000, "a\0b", "\udcff", "~nosuchuser/x"],
    ids=["file", "below a file", "proc", "long", "NUL", "surrogate", "nobody's home"],
)
@pytest.mark.parametrize("key", ["run-dir", "resume"])
def test_a_folder_that_can_be_none_is_one_line(
    key: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    with pytest.raises(UsageError, match=rf"^(setting )?{key}=[^\n]*$") as raised:
        api.execute(api.plan({**TINY, key: name}))
    assert len(str(raised.value)) < 400
    assert Path("file").read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_one_line(
    federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(UsageError, match=r"^setting run-dir=.*: Read-only file system; give"):
        federate("run", **SHORT)


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert api.plan({**TINY, "run-dir": "~/x"}).run_dir == tmp_path / "x"


# One run at a time


@pytest.mark.parametrize("key", ["run-dir", "resume"])
def test_a_second_run_in_a_folder_is_refused_and_the_first_one_ends(
    key: str, run: RunFolder, federate: Federate, tmp_path: Path, reference: Reference
) -> None:
    folder = run.path if key == "resume" else tmp_path / "new"
    begin_anew = functools.partial(federate, "new", **SHORT)
    folder.mkdir(exist_ok=True)
    with place.held(folder):
        begin = functools.partial(resume, run) if key == "resume" else begin_anew
        with pytest.raises(UsageError, match=r"^.*: another run is at work there; [^\n]*$"):
            begin()
        assert not (tmp_path / "new" / "settings.json").exists()
        assert (run.path / "error.txt").read_text() == "of before"
    if key == "resume":
        resume(run)
        assert_same(run, reference(num_server_rounds=4, **SHORT))


def test_runs_begun_in_one_second_get_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(place, "stamp", lambda: "20260101-000000")
    monkeypatch.setattr(cells, "stamp", place.stamp)
    plans = [api.plan(TINY), api.plan(TINY)]
    roots = {new_root("") for _ in range(2)}
    assert len({plan.run_dir for plan in plans} | roots) == 4
    assert {plan.settings.run_dir for plan in plans} == {str(plan.run_dir) for plan in plans}
