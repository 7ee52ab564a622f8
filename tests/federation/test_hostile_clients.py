"""One bad client never ends or spoils the run of the others."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Error, Message

from pfedmoap_flwr.engines import in_process
from pfedmoap_flwr.engines.in_process import FIRST_NODE_ID, InProcessGrid
from pfedmoap_flwr.errors import RunFailed
from pfedmoap_flwr.federation.messages import to_arrays
from support.federation import Federate, kept_head, rounds, run_tiny

HOSTILE = 2
Change = Callable[[Message], Message | list[Message]]


def hostile(
    monkeypatch: pytest.MonkeyPatch, change: Change, clients: tuple[int, ...] = (HOSTILE,)
) -> None:
    """Let these clients' answers pass through `change` on their way."""

    class HostileGrid(InProcessGrid):
        def send_and_receive(
            self, messages: Iterable[Message], *, timeout: float | None = None
        ) -> Iterable[Message]:
            nodes = {FIRST_NODE_ID + client for client in clients}
            found: list[Message] = []
            messages = list(messages)
            asked = {}
            replies = super().send_and_receive(messages, timeout=timeout)
            asked = {m.metadata.message_id: m for m in messages}
            for reply in replies:
                message = asked[reply.metadata.reply_to_message_id]
                bad = message.metadata.dst_node_id in nodes
                given = change(reply) if bad else reply
                found += given if isinstance(given, list) else [given]
            return found

    monkeypatch.setattr(in_process, "InProcessGrid", HostileGrid)


def is_trained(reply: Message) -> bool:
    return not reply.has_error() and "arrays" in reply.content


def uploading(tensor: torch.Tensor | None = None, **numbers: Any) -> Change:
    """Upload another prompt, or other numbers about it."""

    def change(reply: Message) -> Message:
        if is_trained(reply):
            if tensor is not None:
                reply.content["arrays"] = to_arrays({"ctx": tensor})
            metrics: Any = reply.content["metrics"]
            for name, value in numbers.items():
                metrics[name.replace("_", "-")] = value
        return reply

    return change


@pytest.mark.parametrize(
    "change",
    [
        uploading(torch.full((4, 32), 1e20), num_examples=0),
        uploading(torch.full((4, 32), 3e38)),
        uploading(torch.full((4, 32), 0.123), num_examples=10**9),
        uploading(torch.full((4, 32), 1e6)),
        uploading(num_examples=-8),
    ],
    ids=["1e20", "3e38", "1e9 examples", "far away", "-8 examples"],
)
def test_a_hostile_upload_is_refused_and_the_others_go_on(
    change: Change, federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile(monkeypatch, change)
    run = federate()
    for record in run.rounds()[1:]:
        assert list(record.failed) == [HOSTILE]
        assert record.failed[HOSTILE].startswith("train: refused: ")
        assert set(record.bytes_up) == {0, 1, 3}
        assert len(record.clients) == 4
    for client_id in (0, 1, 3):
        assert all(t.isfinite().all() for t in kept_head(run, client_id).values())


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The rounds of a run in which client 2 uploads nothing that counts."""
    with pytest.MonkeyPatch.context() as patch:
        hostile(patch, uploading(num_examples=0))
        return rounds(run_tiny(tmp_path_factory.mktemp("hostile") / "run"))


def nameless(record: dict[str, Any]) -> dict[str, Any]:
    """A round without the words of what failed."""
    return {**record, "failed": list(record["failed"]), "causes": None}


def blank_error(reply: Message) -> Message:
    return failing(reply, " \n ") if is_trained(reply) else reply


def failing(reply: Message, reason: str) -> Message:
    error = Message(Error(code=2, reason=reason), reply_to=reply)
    error.metadata.__dict__["_reply_to_message_id"] = reply.metadata.reply_to_message_id
    return error


def empty(reply: Message) -> Message:
    if is_trained(reply):
        reply.content.clear()
    return reply


def forging(reply: Message) -> Message:
    text = "boom\x1b[2J\n[INFO] run completed" + "x" * 10**6
    return failing(reply, text) if is_trained(reply) else reply


@pytest.mark.parametrize("change", [blank_error, empty, forging])
def test_the_others_numbers_do_not_depend_on_how_a_client_fails(
    change: Change,
    without: list[dict[str, Any]],
    federate: Federate,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hostile(monkeypatch, change)
    found = rounds(federate())
    assert list(map(nameless, found)) == list(map(nameless, without))
    for record in found[1:]:
        assert record["failed"][HOSTILE].isprintable()
        assert len(record["failed"][HOSTILE]) < 1200


def test_the_first_answer_counts_and_one_to_nobody_is_none(
    reference: Callable[..., Any], federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice(reply: Message) -> list[Message]:
        if not is_trained(reply):
            return [reply]
        second = failing(reply, "again")
        stray = failing(reply, "stray")
        stray.metadata.__dict__["_reply_to_message_id"] = "nobody's"
        return [reply, second, stray]

    expected = rounds(reference())
    hostile(monkeypatch, twice)
    assert rounds(federate()) == expected


def test_a_bad_measurement_is_left_out_of_the_mean(
    federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lying(reply: Message) -> Message:
        if "arrays" not in reply.content and "metrics" in reply.content:
            reply.content["metrics"]["personal-accuracy"] = 7.5
        return reply

    hostile(monkeypatch, lying)
    run = federate()
    for record in run.rounds():
        assert set(record.clients) == {0, 1, 3}
        assert "personal-accuracy is 7.5, not a number from 0 to 1" in record.failed[HOSTILE]
    assert run.summary()["personal_accuracy"] <= 1


def test_training_and_measuring_that_both_fail_are_both_told(
    federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def always(reply: Message) -> Message:
        asked = is_trained(reply) or "metrics" in reply.content
        return failing(reply, "boom") if asked else reply

    hostile(monkeypatch, always)
    assert federate().rounds()[1].failed == {HOSTILE: "train: boom; evaluate: boom"}


def test_who_is_refused_again_and_again_rests(
    federate: Federate, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def lying(reply: Message) -> Message:
        asked = is_trained(reply) or "metrics" in reply.content
        if asked:
            reply.content["metrics"]["client"] = 0
        return reply

    hostile(monkeypatch, lying)
    run = federate(num_server_rounds=3, flat={"server.max-refusals": 3})
    asked = [set(record.bytes_down) for record in run.rounds()]
    everyone = {0, 1, 2, 3}
    # Refused in round 0, twice in round 1
    assert asked == [set(), everyone, everyone - {HOSTILE}, everyone - {HOSTILE}]
    assert "client 2 was refused 3 times in a row" in caplog.text


# Too few


def broken(reply: Message) -> Message:
    return failing(reply, "boom") if is_trained(reply) else reply


def test_a_round_whose_only_participant_fails_draws_another(
    federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = federate("honest", fraction_train=0.25)
    drawn = [next(iter(record.bytes_up)) for record in honest.rounds()[1:]]
    hostile(monkeypatch, broken, (drawn[0],))
    run = federate(fraction_train=0.25, flat={"server.attempts": 20})
    first = run.rounds()[1]
    assert first.failed == {drawn[0]: "train: boom"}
    assert first.bytes_up
    assert drawn[0] not in first.bytes_up


def test_a_round_that_cannot_go_otherwise_stops_at_once(
    federate: Federate, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hostile(monkeypatch, broken, (0, 1, 2, 3))
    said = r"round 1: 0 of 4 clients answered as they should \(server.min-replies=1\); boom"
    with pytest.raises(RunFailed, match=said):
        federate()
    assert "0 of 4 clients" in (tmp_path / "run" / "error.txt").read_text()


def test_fewer_good_uploads_than_asked_for_stop_the_run(
    federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile(monkeypatch, broken)
    assert federate("three", flat={"server.min-replies": 3}).rounds()[-1].round == 2
    with pytest.raises(RunFailed, match="3 of 4 clients answered"):
        federate("four", flat={"server.min-replies": 4})
