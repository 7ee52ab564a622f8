"""What is on disk: the server's checkpoint and the clients' kept heads, whole or not at all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pfedmoap_flwr import api
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.base import ServerState
from pfedmoap_flwr.runs import checkpoint
from pfedmoap_flwr.runs.folder import load_settings
from pfedmoap_flwr.settings import Value
from support.federation import Federate, tensor_files
from support.tensors import bits, breakages

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
            shared={"ctx": odd, "half": odd.clamp(-6e4).half(), "brain": odd.bfloat16()},
            pool={1: {"ctx": odd.double()}},
            round=3,
            extra={"count": torch.tensor(5), "none": torch.empty(0, 4), "x/y": odd},
        ),
    }


@pytest.mark.parametrize("kind", servers())
def test_a_checkpoint_is_read_back_bit_for_bit(kind: str, tmp_path: Path) -> None:
    server = servers()[kind]
    checkpoint.save(server, tmp_path, "")
    loaded = checkpoint.load(tmp_path)
    assert bits(loaded.shared) == bits(server.shared)
    assert bits(loaded.extra) == bits(server.extra)
    assert {c: bits(t) for c, t in loaded.pool.items()} == {
        c: bits(t) for c, t in server.pool.items()
    }
    assert loaded.round == server.round
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]


def test_a_checkpoint_of_an_earlier_version_is_said_to_be_one(tmp_path: Path) -> None:
    header = {"round": 1, "pool": [], "digest": ""}
    path = tmp_path / checkpoint.FILE
    save_file({"shared/ctx": torch.zeros(1)}, path, {"state": json.dumps(header)})
    with pytest.raises(ValueError, match=r"^was written by an earlier version$"):
        checkpoint.read(path)


def test_a_checkpoint_is_read_back_after_a_run_of_a_method_that_sends_nothing(
    federate: Federate,
) -> None:
    server = checkpoint.load(federate(method="coop", fraction_train=0.5, **SHORT).path)
    assert (server.shared, server.pool, server.extra) == ({}, {}, {})
    assert server.round == 2


@breakages
def test_a_torn_checkpoint_leaves_the_old_one(
    where: str, broken: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(servers()["class-specific"], tmp_path, "")
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    monkeypatch.setattr(where, broken)
    with pytest.raises(OSError, match=r"space|killed"):
        checkpoint.save(servers()["before round 1"], tmp_path, "")
    monkeypatch.undo()
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]
    checkpoint.save(servers()["before round 1"], tmp_path, "")
    assert checkpoint.load(tmp_path).round == 0


def test_what_is_saved_is_not_what_is_held(tmp_path: Path) -> None:
    server = servers()["class-specific"]
    checkpoint.save(server, tmp_path, "")
    loaded = checkpoint.load(tmp_path)
    server.shared["ctx"].zero_()
    assert loaded.shared["ctx"].abs().sum() > 0
    checkpoint.save(server, tmp_path, "")
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
