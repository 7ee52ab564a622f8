"""What is on disk: the server's checkpoint and the clients' kept heads, whole or not at all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pfedmoap_flwr import api
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.base import ServerState
from pfedmoap_flwr.runs import checkpoint
from pfedmoap_flwr.runs.folder import RunFolder, load_settings
from pfedmoap_flwr.runs.heads import KeptHeads
from pfedmoap_flwr.settings import Value
from support.federation import Federate, tensor_files

SHORT = {"local_epochs": 1, "batch_size": 16}


def servers() -> dict[str, ServerState]:
    torch.manual_seed(0)
    ctx = torch.randn(5, 4, 8)
    odd = torch.tensor([0.0, -0.0, 1e-45, -1e38, 1 / 3])
    return {
        "class-specific": ServerState(
            shared={"ctx": ctx},
            pool={10: {"ctx": ctx + 1}, 2: {"ctx": ctx / 3}},
            round=12,
        ),
        "clients in the pool without tensors": ServerState({}, {0: {}, 11: {}}, round=1),
        "before round 1": ServerState({"ctx": ctx}),
        "names with slashes, views, one tensor twice": ServerState(
            shared={"a/b": ctx[:, 1], "a.c": ctx.transpose(0, 2)},
            pool={3: {"a/b": ctx[0], "a.c": ctx[0]}},
            round=2,
        ),
        "extra tensors, all kinds of numbers": ServerState(
            shared={"ctx": odd, "half": odd.half(), "brain": odd.bfloat16()},
            pool={1: {"ctx": odd.double()}},
            round=3,
            extra={"count": torch.tensor(5), "none": torch.empty(0, 4), "x/y": odd},
        ),
    }


def bits(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {
        name: (t.dtype, t.shape, t.contiguous().flatten().view(torch.uint8).tolist())
        for name, t in tensors.items()
    }


@pytest.mark.parametrize("kind", servers())
def test_a_checkpoint_is_read_back_bit_for_bit(kind: str, tmp_path: Path) -> None:
    server = servers()[kind]
    checkpoint.save(server, tmp_path)
    loaded = checkpoint.load(tmp_path)
    assert bits(loaded.shared) == bits(server.shared)
    assert bits(loaded.extra) == bits(server.extra)
    assert {c: bits(t) for c, t in loaded.pool.items()} == {
        c: bits(t) for c, t in server.pool.items()
    }
    assert loaded.round == server.round
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]


def test_a_checkpoint_is_read_back_after_a_run_of_a_method_that_sends_nothing(
    federate: Federate,
) -> None:
    server = checkpoint.load(federate(method="coop", fraction_train=0.5, **SHORT).path)
    assert (server.shared, server.pool, server.extra) == ({}, {}, {})
    assert server.round == 2


def torn(path: Path, content: bytes) -> int:
    with path.open("wb") as file:
        file.write(content[: len(content) // 2])
    raise OSError("no space left on device")


def not_renamed(source: Path, target: Path) -> None:
    raise OSError("killed")


breakages = pytest.mark.parametrize(
    ("where", "broken"), [("pathlib.Path.write_bytes", torn), ("os.replace", not_renamed)]
)


@breakages
def test_a_torn_checkpoint_leaves_the_old_one(
    where: str, broken: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(servers()["class-specific"], tmp_path)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    monkeypatch.setattr(where, broken)
    with pytest.raises(OSError, match=r"space|killed"):
        checkpoint.save(servers()["before round 1"], tmp_path)
    monkeypatch.undo()
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]
    checkpoint.save(servers()["before round 1"], tmp_path)
    assert checkpoint.load(tmp_path).round == 0


def test_what_is_saved_is_not_what_is_held(tmp_path: Path) -> None:
    server = servers()["class-specific"]
    checkpoint.save(server, tmp_path)
    loaded = checkpoint.load(tmp_path)
    server.shared["ctx"].zero_()
    assert loaded.shared["ctx"].abs().sum() > 0
    checkpoint.save(server, tmp_path)
    assert loaded.shared["ctx"].abs().sum() > 0


# Resuming


@pytest.mark.parametrize("present", [(), ("settings.json",), ("checkpoint.safetensors",)])
def test_a_folder_without_a_run_cannot_be_resumed(
    present: tuple[str, ...], federate: Federate, tmp_path: Path
) -> None:
    run = federate("whole", num_server_rounds=1, **SHORT)
    empty = tmp_path / "other"
    empty.mkdir()
    for name in present:
        (empty / name).write_bytes((run.path / name).read_bytes())
    for folder in (empty, tmp_path / "nowhere"):
        with pytest.raises(UsageError, match=rf"resume={folder}: no .* there"):
            federate("again", resume=str(folder), **SHORT)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", 0.5),
        ("seed", 1),
        ("method", "promptfl"),
        ("pfedmoap.lambda", 0.25),
        ("prompt.n-ctx", 8),
        ("data.alpha", 0.9),
        ("fraction-train", 0.5),
    ],
)
def test_a_changed_setting_is_named_and_the_run_is_left_as_it_was(
    key: str, value: Any, federate: Federate
) -> None:
    run = federate("whole", num_server_rounds=1, **SHORT)
    before = tensor_files(run), (run.path / "rounds.jsonl").read_bytes()
    said = rf"setting {key}={value!r}: the run to resume has "
    flat = {"resume": str(run.path), "num-server-rounds": 2, key: value}
    with pytest.raises(UsageError, match=said):
        federate("whole", flat=flat, **SHORT)
    # The command finds it before it starts anything
    with pytest.raises(UsageError, match=said):
        api.plan(flat)
    assert (tensor_files(run), (run.path / "rounds.jsonl").read_bytes()) == before


def test_places_may_change_when_a_run_is_resumed(federate: Federate) -> None:
    run = federate("whole", num_server_rounds=1, **SHORT)
    plan = api.plan({"resume": str(run.path), "num-server-rounds": 3, "node-timeout": 5.0})
    assert plan.run_dir == run.path
    changed: dict[str, Value] = {"num-server-rounds": 3, "node-timeout": 5.0, "min-nodes": 4}
    changed["resume"] = str(run.path)
    assert plan.settings == load_settings(run.path).replace(changed)


def test_a_folder_that_holds_a_run_is_not_written_over(federate: Federate) -> None:
    run = federate("whole", num_server_rounds=1, **SHORT)
    before = tensor_files(run), (run.path / "rounds.jsonl").read_bytes()
    with pytest.raises(UsageError, match=r"run-dir=.*whole: .*resume="):
        federate("whole", num_server_rounds=1, **SHORT)
    with pytest.raises(UsageError, match=r"run-dir=.*whole: .*resume="):
        api.plan({"run-dir": str(run.path)})
    assert (tensor_files(run), (run.path / "rounds.jsonl").read_bytes()) == before


def test_what_an_earlier_run_of_the_same_name_left_with_the_clients_has_no_say(
    federate: Federate, tmp_path: Path
) -> None:
    options = {"num_server_rounds": 3, "fraction_train": 0.5, "lr": 0.05, **SHORT}
    shared = {"state-dir": str(tmp_path / "state")}
    federate("first/run", seed=1, flat=shared, **options)
    second = federate("second/run", flat=shared, **options)
    alone = federate("alone/run", **options)
    assert [r.clients for r in second.rounds()] == [r.clients for r in alone.rounds()]
    checkpoints = [tensor_files(run)["checkpoint.safetensors"] for run in (second, alone)]
    assert checkpoints[0] == checkpoints[1]


# Kept heads


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


def test_the_newest_two_are_kept_and_later_rounds_are_dropped(tmp_path: Path) -> None:
    heads = KeptHeads(tmp_path)
    for server_round in (1, 2, 5, 9):
        heads.save(server_round, head(server_round))
    assert kept_rounds(tmp_path) == ["round-00005.safetensors", "round-00009.safetensors"]
    # A server that resumes after round 5 comes to round 6 again
    heads.save(6, head(66.0))
    assert kept_rounds(tmp_path) == ["round-00005.safetensors", "round-00006.safetensors"]
    heads.save(6, head(6.0))
    assert kept_rounds(tmp_path) == ["round-00005.safetensors", "round-00006.safetensors"]
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
