"""What a client keeps of a run on its own disk: whole heads, found again, bounded, checked."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.runs import heads as store
from pfedmoap_flwr.runs.folder import RunFolder
from pfedmoap_flwr.runs.heads import KeptHeads, folder_of
from support.disk import traced
from support.federation import Federate, make_method, tensor_files
from support.tensors import bits, breakages

SHORT = {"local_epochs": 1, "batch_size": 16}


def head(value: float) -> dict[str, Tensor]:
    return {"ctx": torch.full((4, 8), value), "experts": torch.empty(0, 4, 8)}


def test_the_newest_head_before_a_round_is_found(tmp_path: Path) -> None:
    heads = KeptHeads(tmp_path / "client-0")
    assert heads.load(before=100) is None
    heads.save(3, head(3.0))
    heads.save(12, head(12.0))
    assert heads.load(before=3) is None
    for before, value in ((4, 3.0), (12, 3.0), (13, 12.0), (100, 12.0)):
        loaded = heads.load(before=before)
        assert loaded is not None
        assert bits(loaded) == bits(head(value))


def kept_rounds(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_three_are_kept_and_later_rounds_are_dropped(tmp_path: Path) -> None:
    heads = KeptHeads(tmp_path)
    for server_round in (1, 2, 5, 9):
        heads.save(server_round, head(server_round))
    assert kept_rounds(tmp_path) == [f"round-0000{n}.safetensors" for n in (2, 5, 9)]
    # A server that resumes after round 5 comes to round 6 again
    heads.save(6, head(66.0))
    assert kept_rounds(tmp_path) == [f"round-0000{n}.safetensors" for n in (2, 5, 6)]
    heads.save(6, head(6.0))
    assert kept_rounds(tmp_path) == [f"round-0000{n}.safetensors" for n in (2, 5, 6)]
    loaded = heads.load(before=7)
    assert loaded is not None
    assert bits(loaded) == bits(head(6.0))


def test_rounds_are_numbers_not_texts(tmp_path: Path) -> None:
    heads = KeptHeads(tmp_path)
    heads.save(99_999, head(1.0))
    heads.save(100_000, head(2.0))
    loaded = heads.load(before=100_001)
    assert loaded is not None
    assert loaded["ctx"][0, 0] == 2


@breakages
def test_a_torn_head_leaves_the_old_one(
    where: str, broken: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = KeptHeads(tmp_path)
    heads.save(1, head(1.0))
    monkeypatch.setattr(where, broken)
    with pytest.raises(OSError, match=r"space|killed"):
        heads.save(2, head(2.0))
    monkeypatch.undo()
    loaded = heads.load(before=100)
    assert loaded is not None
    assert bits(loaded) == bits(head(1.0))


def test_clients_and_runs_do_not_share_a_folder(federate: Federate, tmp_path: Path) -> None:
    state = tmp_path / "state"
    options = {"num_server_rounds": 1, "flat": {"state-dir": str(state)}, **SHORT}
    # Two runs of one name: a run's id tells them apart
    runs = [federate("here/run", **options), federate("there/run", seed=1, **options)]
    assert runs[0].run_id != runs[1].run_id
    found = {str(path.parent.relative_to(state)) for path in state.rglob("*.safetensors")}
    assert found == {f"{run.run_id}/client-{client}" for run in runs for client in range(4)}
    alone = federate("alone", num_server_rounds=1, **SHORT)
    for client in range(4):
        name = f"client-{client}/round-00001.safetensors"
        own = (state / runs[0].run_id / name).read_bytes()
        assert own == tensor_files(alone)[f"clients/RUN/{name}"]


def test_a_message_that_names_a_path_as_its_run_is_refused(
    federate: Federate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunFolder, "run_id", "../../elsewhere")
    with pytest.raises(UsageError, match="32 hexadecimal digits"):
        federate("run", num_server_rounds=1, **SHORT)
    assert list(tmp_path.rglob("*elsewhere*")) == []


# What is damaged or gone


def real_heads(folder: Path) -> tuple[KeptHeads, dict[str, Tensor]]:
    """Rounds 1 and 2 of a pFedMoAP client that has borrowed experts in both."""
    like = make_method("pfedmoap").build()
    state = like.state() | {"experts": torch.ones(2, 4, 32)}
    heads = KeptHeads(folder, like)
    for server_round in (1, 2):
        heads.save(server_round, state | {"ctx": torch.full((4, 32), float(server_round))})
    return heads, state


DAMAGES: dict[str, Any] = {
    "half": lambda path, state: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path, state: path.write_bytes(b""),
    "foreign": lambda path, state: path.write_bytes(b"PK" * 1000),
    "a folder": lambda path, state: (path.unlink(), path.mkdir()),
    "not a number": lambda path, state: save_file(
        state | {"gate.query.weight": state["gate.query.weight"] * torch.nan}, path
    ),
    "infinite": lambda path, state: save_file(state | {"ctx": state["ctx"] / 0}, path),
    "a borrowed expert that is no number": lambda path, state: save_file(
        state | {"experts": torch.full((2, 4, 32), torch.nan)}, path
    ),
    "another shape": lambda path, state: save_file(state | {"ctx": torch.ones(5, 32)}, path),
    "another dtype": lambda path, state: save_file(state | {"ctx": state["ctx"].double()}, path),
    "another's names": lambda path, state: save_file({"context": state["ctx"]}, path),
    "a name too many": lambda path, state: save_file(state | {"more": state["ctx"] + 1}, path),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_head_is_said_and_the_one_before_is_used(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    heads, state = real_heads(tmp_path / "client-0")
    newest = tmp_path / "client-0" / "round-00002.safetensors"
    assert heads.load(before=9)["ctx"][0, 0] == 2  # type: ignore[index]
    assert not caplog.records
    DAMAGES[damage](newest, state)
    with caplog.at_level(logging.WARNING):
        loaded = heads.load(before=9, trained=2)
    assert loaded is not None
    assert (loaded["ctx"] == 1).all()
    assert f"{newest} cannot be used (" in caplog.text
    assert "goes on from that of round 1" in caplog.text


@pytest.mark.parametrize("how", ["deleted", "damaged"])
def test_heads_that_should_be_there_are_missed_in_the_log(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    heads, _ = real_heads(tmp_path / "client-0")
    for path in list((tmp_path / "client-0").iterdir()):
        path.unlink() if how == "deleted" else path.write_bytes(b"torn")
    with caplog.at_level(logging.WARNING):
        assert heads.load(before=9, trained=2) is None
    assert "trained in round 2 and no usable head is there" in caplog.text
    caplog.clear()
    assert KeptHeads(tmp_path / "client-1").load(before=9) is None
    assert not caplog.records


def test_files_of_other_names_are_nobodys_heads(tmp_path: Path) -> None:
    heads = KeptHeads(tmp_path)
    heads.save(1, head(1.0))
    strange = ["round-00002 (copy)", "round--0001", "round-3", "round-", "round-00007.bak"]
    for name in strange:
        (tmp_path / f"{name}.safetensors").write_bytes(b"mine")
    loaded = heads.load(before=100)
    assert loaded is not None
    assert bits(loaded) == bits(head(1.0))
    for server_round in range(2, 8):
        heads.save(server_round, head(2.0))
    assert all((tmp_path / f"{name}.safetensors").read_bytes() == b"mine" for name in strange)


def test_a_full_disk_leaves_the_old_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = KeptHeads(tmp_path)
    heads.save(1, head(1.0))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for place in ("pfedmoap_flwr.files.write", "os.fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(place, full)
            with pytest.raises(OSError, match="No space left"):
                heads.save(2, head(2.0))
        assert kept_rounds(tmp_path) == ["round-00001.safetensors"]


# What fills up a disk


def test_heads_of_the_oldest_runs_make_room(tmp_path: Path) -> None:
    runs = [f"{number:032x}" for number in range(store.KEPT_RUNS + 3)]
    for age, run in enumerate(runs):
        for client in (0, 1):
            folder = folder_of(tmp_path, run, client)
            KeptHeads(folder).save(1, head(1.0))
            for path in [*folder.iterdir(), folder]:
                os.utime(path, (1e9 + age, 1e9 + age))
    # Client 1 goes on in its oldest run that is left: no room is made, and it is now the newest
    KeptHeads(folder_of(tmp_path, runs[3], 1)).save(2, head(2.0))
    (tmp_path / "notes").mkdir()
    for client in (0, 1):
        KeptHeads(folder_of(tmp_path, "f" * 32, client)).save(1, head(1.0))
    left = {c: {p.parent.name for p in tmp_path.glob(f"*/client-{c}")} for c in (0, 1)}
    assert left[0] == {*runs[4:], "f" * 32}
    assert left[1] == {runs[3], *runs[5:], "f" * 32}
    assert {path.name for path in tmp_path.iterdir()} == left[0] | left[1] | {"notes"}


def test_what_else_lies_in_the_folder_of_an_old_run_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "KEPT_RUNS", 1)
    old, new = uuid4().hex, uuid4().hex
    KeptHeads(folder_of(tmp_path, old, 0)).save(1, head(1.0))
    (tmp_path / old / "client-0" / "notes.txt").write_text("mine")
    for path in [*(tmp_path / old / "client-0").iterdir(), tmp_path / old / "client-0"]:
        os.utime(path, (1e9, 1e9))
    KeptHeads(folder_of(tmp_path, new, 0)).save(1, head(1.0))
    assert kept_rounds(tmp_path / old / "client-0") == ["notes.txt"]


# What comes over the wire


@pytest.mark.parametrize(
    "run_id",
    ["../../../evil", "..", "", "a/b", "/tmp", "x" * 300, "0" * 31 + "\0", 7, None, "A" * 32],
)
def test_a_run_that_is_no_id_becomes_no_path(run_id: object, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^a run's id is 32 hexadecimal digits"):
        folder_of(tmp_path, run_id, 0)


def test_a_link_out_of_the_state_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    state = tmp_path / "state"
    state.mkdir()
    (state / ("0" * 32)).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="leads out of it"):
        folder_of(state, "0" * 32, 0)
    # The state folder itself may be a link
    (tmp_path / "link").symlink_to(state)
    assert folder_of(tmp_path / "link", "1" * 32, 0) == state / ("1" * 32) / "client-0"


def test_a_head_is_lasting_when_save_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = traced(monkeypatch)
    KeptHeads(tmp_path / "run" / "client-0").save(1, head(1.0))
    steps = [step.partition(" of ")[0] for step in steps]  # whatever the head's size
    assert sorted(steps[:2]) == sorted([f"sync {tmp_path.name}", "sync run"])
    assert steps[2:] == ["sync part", "rename to round-00001.safetensors", "sync client-0"]
