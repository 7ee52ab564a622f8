"""Laws 3, 4 and 5, for every method: runs that stop, and replies that come late or never."""

import functools
import random
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from torch import Tensor

from pfedmoap_flwr import api
from pfedmoap_flwr.engines import in_process
from pfedmoap_flwr.engines.in_process import FIRST_NODE_ID, InProcessGrid
from pfedmoap_flwr.federation.strategy import PromptStrategy
from pfedmoap_flwr.methods.base import Method, ServerState, Work
from pfedmoap_flwr.runs import checkpoint
from pfedmoap_flwr.runs.folder import RunFolder
from pfedmoap_flwr.training import local
from support.federation import Federate, assert_same, rounds, run_tiny, tensor_files
from support.laws import SHORT, THREE_ROUNDS, every_method

Kill = Callable[[pytest.MonkeyPatch, int], None]


# Law 3


class Killed(BaseException):
    """The process of the server ended."""


def kill_while_training(monkeypatch: pytest.MonkeyPatch, server_round: int) -> None:
    """End the run when two clients have trained in a round and saved their heads."""

    class MortalGrid(InProcessGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            messages = list(messages)
            ids = list(super().push_messages(messages[:2]))
            config = messages[0].content["config"]
            if messages[0].metadata.message_type == "train" and config["round"] == server_round:
                raise Killed
            return ids + list(super().push_messages(messages[2:]))

    monkeypatch.setattr(in_process, "InProcessGrid", MortalGrid)


def kill_before_checkpoint(monkeypatch: pytest.MonkeyPatch, server_round: int) -> None:
    """End the run when a round is written down and its checkpoint is not."""
    save = checkpoint.save

    def mortal(state: ServerState, run_dir: Path, run_id: str) -> None:
        if state.round == server_round:
            raise Killed
        save(state, run_dir, run_id)

    monkeypatch.setattr(checkpoint, "save", mortal)


def run_until_killed(federate: Federate, kill: Kill, server_round: int, **options: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, server_round)
        with pytest.raises(Killed):
            federate("parts/run", **options)


def resumed(run: RunFolder) -> RunFolder:
    """Go on to round 3 as `pfedmoap run resume=DIR num-server-rounds=3` does."""
    api.execute(api.plan({"resume": str(run.path), "num-server-rounds": 3}))
    return run


@every_method
def test_3_a_round_and_two_more_are_three(
    method: str, reference: Federate, federate: Federate
) -> None:
    options = {"method": method, **THREE_ROUNDS}
    whole = reference(**options)
    run = federate("parts/run", **{**options, "num_server_rounds": 1})
    assert_same(resumed(run), whole)


@every_method
@pytest.mark.parametrize("kill", [kill_while_training, kill_before_checkpoint])
def test_3_a_run_killed_in_round_2_goes_on_as_if_nothing_had_been(
    method: str, kill: Kill, reference: Federate, federate: Federate, tmp_path: Path
) -> None:
    options = {"method": method, **THREE_ROUNDS}
    whole = reference(**options)
    run_until_killed(federate, kill, 2, **options)
    run = RunFolder(tmp_path / "parts" / "run")
    assert checkpoint.load(run.path).round == 1
    assert list(run.path.rglob("round-00002.safetensors")) != []
    assert_same(resumed(run), whole)


@pytest.mark.slow
@pytest.mark.parametrize("kill", [kill_while_training, kill_before_checkpoint])
def test_3_a_run_killed_in_round_1_does_not_begin_twice(
    kill: Kill, reference: Federate, federate: Federate, tmp_path: Path
) -> None:
    options = {"method": "pfedmoap", **THREE_ROUNDS}
    whole = reference(**options)
    run_until_killed(federate, kill, 1, **options)
    run = RunFolder(tmp_path / "parts" / "run")
    assert checkpoint.load(run.path).round == 0
    assert_same(resumed(run), whole)


@pytest.mark.slow
def test_3_resuming_a_finished_run_changes_nothing(reference: Federate, federate: Federate) -> None:
    options = {"method": "pfedmoap", **THREE_ROUNDS}
    again = federate("again/run", **options)
    assert_same(resumed(again), reference(**options))


@pytest.mark.slow
def test_3_a_line_that_was_being_written_is_written_again(
    reference: Federate, federate: Federate
) -> None:
    options = {"method": "pfedmoap", **THREE_ROUNDS}
    whole = reference(**options)
    run = federate("parts/run", **{**options, "num_server_rounds": 2})
    with (run.path / "rounds.jsonl").open("a") as file:
        file.write('{"round": 3, "seconds": 0.')
    assert_same(resumed(run), whole)


# Law 4


def reverse(items: list[Any]) -> list[Any]:
    return items[::-1]


def shuffle(items: list[Any]) -> list[Any]:
    return random.sample(items, len(items))


@every_method
@pytest.mark.parametrize(("of_work", "of_replies"), [(reverse, list), (shuffle, shuffle)])
def test_4_the_order_of_work_and_of_replies_is_irrelevant(
    method: str,
    of_work: Callable[[list[Any]], list[Any]],
    of_replies: Callable[[list[Any]], list[Any]],
    reference: Federate,
    federate: Federate,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    orderly = reference(method=method, **THREE_ROUNDS)

    class DisorderlyGrid(InProcessGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            return super().push_messages(of_work(list(messages)))

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            return of_replies(list(super().pull_messages(message_ids)))

    monkeypatch.setattr(in_process, "InProcessGrid", DisorderlyGrid)
    random.seed(3)
    assert_same(federate("disorderly/run", method=method, **THREE_ROUNDS), orderly)


# Law 5

BROKEN = 2


def leave_out(monkeypatch: pytest.MonkeyPatch, server_round: int) -> None:
    """Do not sample one client in one round."""
    participants = PromptStrategy.participants

    def smaller(self: PromptStrategy, number: int, attempt: int) -> list[int]:
        drawn = participants(self, number, attempt)
        return [c for c in drawn if (c, number) != (BROKEN, server_round)]

    monkeypatch.setattr(PromptStrategy, "participants", smaller)


def without(record: dict[str, Any], number: int) -> dict[str, Any]:
    """A round's record without what it says of a failure in that round."""
    if record["round"] != number:
        return record
    down = {c: n for c, n in record["bytes_down"].items() if c != BROKEN}
    return {**record, "failed": {}, "causes": {}, "bytes_down": down}


@pytest.fixture(scope="module")
def absent(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], RunFolder]:
    """Return a method's run of two rounds in which BROKEN is not asked to train in the second.

    It is run once, so ask for it before anything is patched.
    """

    @functools.cache
    def run(method: str) -> RunFolder:
        with pytest.MonkeyPatch.context() as patch:
            leave_out(patch, 2)
            folder = tmp_path_factory.mktemp("absent") / "run"
            return run_tiny(folder, method=method, **SHORT)

    return run


@every_method
def test_5_a_client_that_raises_changes_nothing_else(
    method: str, federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"method": method, "num_server_rounds": 3, **SHORT}
    with pytest.MonkeyPatch.context() as patch:
        leave_out(patch, 2)
        expected = federate("absent/run", **options)
    train = local.train

    def fragile(method: Any, works: list[Any], phases: Any = None) -> dict[int, float | None]:
        if works[0].round == 2 and BROKEN in [work.client_id for work in works]:
            raise RuntimeError("out of memory")
        return train(method, works, phases)

    monkeypatch.setattr(local, "train", fragile)
    run = federate("failed/run", **options)
    assert [record.failed for record in run.rounds()] == [
        {},
        {},
        {BROKEN: "train: RuntimeError: out of memory"},
        {},
    ]
    assert tensor_files(run) == tensor_files(expected)
    assert [without(record, 2) for record in rounds(run)] == rounds(expected)


@every_method
def test_5_an_upload_that_is_lost_changes_nothing_else(
    method: str,
    absent: Callable[[str], RunFolder],
    federate: Federate,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = absent(method)

    class LossyGrid(InProcessGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            ids: list[str] = []
            for message in messages:
                ids += super().push_messages([message])
                config, node = message.content.get("config", {}), message.metadata.dst_node_id
                key = (message.metadata.message_type, config.get("round"), node - FIRST_NODE_ID)
                if key == ("train", 2, BROKEN):
                    del self.replies[ids[-1]]
            return ids

    monkeypatch.setattr(in_process, "InProcessGrid", LossyGrid)
    run = federate("lost/run", method=method, **SHORT)
    assert run.rounds()[2].failed == {BROKEN: "train: no reply"}
    # That client did train: its own head, and its own accuracy with it, are another's
    assert of_others(tensor_files(run)) == of_others(tensor_files(expected))
    for record, other in zip(rounds(run), rounds(expected), strict=True):
        record = without(record, 2)
        assert record["clients"].keys() == other["clients"].keys()
        del record["clients"][BROKEN], other["clients"][BROKEN]
        assert record == other


def of_others(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if f"client-{BROKEN}/" not in name}


@pytest.mark.parametrize("eval_every", [1, 3])
def test_5_a_failure_is_named_by_what_failed(
    eval_every: int, federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, accuracies = local.train, local.accuracies
    evaluated: list[int] = []

    def fragile_train(method: Any, works: Any, phases: Any = None) -> dict[int, float | None]:
        if (works[0].client_id, works[0].round) == (BROKEN, 1):
            raise RuntimeError("cannot train")
        return train(method, works, phases)

    def fragile_accuracies(*arguments: Any) -> dict[str, float]:
        evaluated.append(1)
        if len(evaluated) == 1:
            raise RuntimeError("cannot evaluate")
        return accuracies(*arguments)

    monkeypatch.setattr(local, "train", fragile_train)
    monkeypatch.setattr(local, "accuracies", fragile_accuracies)
    run = federate(eval_every=eval_every, num_server_rounds=3, **SHORT)
    assert [record.failed for record in run.rounds()] == [
        {0: "evaluate: RuntimeError: cannot evaluate"},
        {BROKEN: "train: RuntimeError: cannot train"},
        {},
        {},
    ]


def spoil(upload: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    ctx = upload["ctx"]
    return {
        "not finite": {"ctx": ctx * torch.nan},
        "shape": {"ctx": ctx[1:]},
        "dtype": {"ctx": ctx.double()},
        "name": {"context": ctx},
        "more": {"ctx": ctx, "gate": ctx},
        "nothing": {},
    }[how]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("not finite", "ctx is not finite"),
        ("shape", r"ctx has shape \(3, 32\), not \(4, 32\)"),
        ("dtype", r"ctx has dtype float64, not float32"),
        ("name", "came with tensors context, not ctx"),
        ("more", "came with tensors ctx, gate, not ctx"),
        ("nothing", "came with tensors none, not ctx"),
    ],
)
def test_5_an_upload_that_cannot_be_merged_is_named_and_left_out(
    how: str,
    said: str,
    absent: Callable[[str], RunFolder],
    federate: Federate,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = absent("pfedmoap")
    upload = Method.upload

    def spoilt(self: Any, work: Work[Any]) -> dict[str, Tensor]:
        tensors = upload(self, work)
        return spoil(tensors, how) if (work.client_id, work.round) == (BROKEN, 2) else tensors

    monkeypatch.setattr(Method, "upload", spoilt)
    run = federate("spoilt/run", method="pfedmoap", **SHORT)
    assert list(run.rounds()[2].failed) == [BROKEN]
    assert re.search(said, run.rounds()[2].failed[BROKEN])
    checkpoints = [tensor_files(r)["checkpoint.safetensors"] for r in (run, expected)]
    assert checkpoints[0] == checkpoints[1]
