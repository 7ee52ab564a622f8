"""What a client refuses, what it keeps of a bad training, and what it tells of an error."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from PIL import UnidentifiedImageError

from pfedmoap_flwr.engines.in_process import identify, make_context
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.federation import client
from pfedmoap_flwr.runs.heads import KeptHeads
from pfedmoap_flwr.training import local
from support.federation import Federate, kept_head
from support.tiny import TINY

SHORT = {"local_epochs": 1, "batch_size": 16}
RUN = "0123456789abcdef" * 2


@pytest.fixture
def context(tmp_path: Path) -> Context:
    identify()
    return make_context(1, {"partition-id": 0}, {**TINY, "state-dir": str(tmp_path / "state")})


def message(kind: str, **said: Any) -> Message:
    config = {"run": RUN, "round": 1, "trained": 0, "zeroshot": False, **said}
    record = ConfigRecord({key: value for key, value in config.items() if value is not None})
    arrays = ArrayRecord({"ctx": Array(torch.zeros(4, 32).numpy())})
    made = Message(RecordDict({"arrays": arrays, "config": record}), 1, kind)
    made.metadata.__dict__["_message_id"] = "1"
    return made


def refusal(asked: Message, context: Context) -> str:
    (reply,) = client.answer([(asked, context)])
    assert reply.has_error()
    assert "\n" not in reply.error.reason
    return str(reply.error.reason)


@pytest.mark.parametrize("kind", ["train", "evaluate"])
@pytest.mark.parametrize(
    ("said", "words"),
    [
        *(({"round": r}, "a whole number from 0 to 2") for r in (-1, 3, 1.9, True, "one", None)),
        *(({"run": r}, "32 hexadecimal digits") for r in ("../../evil", "", "/tmp", None, 7)),
    ],
)
def test_a_message_of_no_round_or_no_run_is_refused_in_one_line(
    kind: str, said: dict[str, Any], words: str, context: Context, tmp_path: Path
) -> None:
    assert words in refusal(message(kind, **said), context)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_message_without_a_config_is_refused(context: Context) -> None:
    asked = message("train")
    del asked.content["config"]
    assert "32 hexadecimal digits" in refusal(asked, context)


@pytest.mark.parametrize("partition_id", [-1, 1.5, "zero", True, 10**30])
def test_a_node_of_no_partition_says_so(partition_id: Any, context: Context) -> None:
    context.node_config["partition-id"] = partition_id
    assert refusal(message("train"), context).startswith("partition-id=")


# A training that went wrong


@pytest.mark.parametrize("at_once", [1, 4])
def test_a_head_that_is_not_finite_is_never_kept(
    at_once: int, federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = local.train

    def poisoned(method: Any, works: Any, phases: Any = None) -> Any:
        losses = train(method, works, phases)
        for work in works:
            if (work.client_id, work.round) == (1, 2):
                work.head.gate.query.weight.data[0, 0] = torch.nan
        return losses

    monkeypatch.setattr(local, "train", poisoned)
    run = federate(num_server_rounds=3, clients_at_once=at_once, **SHORT)
    failed = [record.failed for record in run.rounds()]
    reason = "train: after training gate.query.weight is not finite; the head of before is kept"
    assert failed[2][1].startswith(reason)
    assert [len(f) for f in failed] == [0, 0, 1, 0]
    # It goes on in round 3 from its head of round 1
    assert all(tensor.isfinite().all() for tensor in kept_head(run, 1).values())
    (folder,) = run.path.rglob("client-1")
    assert [path.name for path in sorted(folder.iterdir())] == [
        "round-00001.safetensors",
        "round-00003.safetensors",
    ]


def test_a_full_disk_is_that_clients_failure_and_its_old_head_stays(
    federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = KeptHeads.save

    def full(self: KeptHeads, server_round: int, head: Any, best: int) -> None:
        if (self.folder.name, server_round) == ("client-1", 2):
            raise OSError(28, "No space left on device", str(self.folder / "part"))
        save(self, server_round, head, best)

    monkeypatch.setattr(KeptHeads, "save", full)
    run = federate(num_server_rounds=3, **SHORT)
    failed = [record.failed for record in run.rounds()]
    assert [len(f) for f in failed] == [0, 0, 1, 0]
    assert failed[2][1] == (
        "train: the trained head cannot be written (No space left on device); the head of before "
        "is kept; make room in the client's state folder"
    )


def test_lost_heads_are_said_in_the_clients_log(
    federate: Federate, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = local.train

    def thieving(method: Any, works: Any, phases: Any = None) -> Any:
        if works[0].round == 2 and works[0].client_id == 0:
            for path in state.rglob("client-3/*"):
                path.unlink()
        return train(method, works, phases)

    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    monkeypatch.setattr(local, "train", thieving)
    state = Path(federate("nothing", num_server_rounds=1, **SHORT).path.parent / "run")
    with caplog.at_level(logging.WARNING):
        run = federate("run", **SHORT)
    assert not any(record.failed for record in run.rounds())
    said = [record.getMessage() for record in caplog.records]
    assert [line for line in said if "client-3: the client trained in round 1" in line]
    assert not [line for line in said if "client-2: " in line]


# What the server is told

FOLDER = "/home/dr-mueller/images of 2024"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("out of memory"), "RuntimeError: out of memory"),
        (RuntimeError("first\nsecond"), "RuntimeError: first second"),
        (UsageError("setting lr=1e9: must be <= 1"), "setting lr=1e9: must be <= 1"),
        (KeyError("arrays"), "KeyError: 'arrays'"),
        (ValueError(), "ValueError"),
        (
            FileNotFoundError(2, "No such file or directory", f"{FOLDER}/patient-John-Roe-HIV.png"),
            "FileNotFoundError: No such file or directory",
        ),
        (UnidentifiedImageError(f"cannot identify '{FOLDER}/John Roe'"), "UnidentifiedImageError"),
        (
            UsageError(f"image features cannot be kept in {FOLDER} (No space left)"),
            "image features cannot be kept in ... (the rest is in the client's log)",
        ),
        (
            UsageError(f"setting data.path='{FOLDER}': no images"),
            "setting data.path='... (the rest is in the client's log)",
        ),
        (ValueError("John Roe.png is broken"), "ValueError: ... (the rest is in the client's log)"),
        (ValueError("John Roe/1 is broken"), "ValueError: ... (the rest is in the client's log)"),
        (ValueError("C:\\Roe\\1"), "ValueError: ... (the rest is in the client's log)"),
        (ValueError("x" * 1000), "ValueError: " + "x" * client.TOLD_LETTERS),
    ],
)
def test_the_server_is_told_a_kind_and_a_text_without_paths(error: Exception, told: str) -> None:
    assert client.told(error) == told


def test_a_traceback_stays_in_the_clients_own_log(
    context: Context, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> Callable[..., Any]:
        raise ValueError(f"{FOLDER}/patient-John-Roe-HIV.png is broken")

    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    monkeypatch.setattr(local, "train", broken)
    assert refusal(message("train"), context) == (
        "ValueError: ... (the rest is in the client's log)"
    )
    assert "Traceback" in caplog.text
    assert "John-Roe" in caplog.text
