"""Nodes that vanish, come back under another id, come late, or lie about who they are."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from flwr.app import Context, Error, Message

from pfedmoap_flwr.engines import in_process
from pfedmoap_flwr.engines.in_process import FIRST_NODE_ID, InProcessGrid, Workers, make_context
from support.federation import Federate, kept_head, rounds
from support.tiny import NUM_CLIENTS

CLIENT = 2
FIRST, SECOND = FIRST_NODE_ID + CLIENT, 5000
GONE = "Node Unavailable"


def moving(
    monkeypatch: pytest.MonkeyPatch, there: Callable[[int, int], bool], **config: Any
) -> None:
    """Let nodes be connected as `there(node_id, round)` says; SECOND is one of client 2's id.

    The round is the one that is next. A node that is gone answers with Flower's error.
    """

    class MovingGrid(InProcessGrid):
        def __init__(self, workers: Workers, contexts: dict[int, Context]) -> None:
            run_config = next(iter(contexts.values())).run_config
            node = {"partition-id": CLIENT, "num-partitions": NUM_CLIENTS, **config}
            super().__init__(workers, contexts | {SECOND: make_context(SECOND, node, run_config)})
            self.round = 1

        def get_node_ids(self) -> Iterable[int]:
            return [node for node in self.contexts if there(node, self.round)]

        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            messages = list(messages)
            ids = list(super().push_messages(messages))
            for message_id, message in zip(ids, messages, strict=True):
                if not there(message.metadata.dst_node_id, self.round):
                    self.replies[message_id] = Message(Error(code=1, reason=GONE), reply_to=message)
            if messages and messages[0].metadata.message_type == "evaluate":
                last = max(int(m.content["config"]["round"]) for m in messages)
                self.round = last + 1
            return ids

    monkeypatch.setattr(in_process, "InProcessGrid", MovingGrid)


def test_a_client_that_comes_back_under_another_id_goes_on_with_its_head(
    federate: Federate, monkeypatch: pytest.MonkeyPatch, reference: Callable[..., Any]
) -> None:
    expected = reference()
    moving(monkeypatch, lambda node, number: node != (FIRST if number > 1 else SECOND))
    run = federate()
    assert rounds(run) == rounds(expected)
    assert {n: t.tolist() for n, t in kept_head(run, CLIENT).items()} == {
        n: t.tolist() for n, t in kept_head(expected, CLIENT).items()
    }


def test_a_client_that_is_away_for_a_round_is_missing_there_alone(
    federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    moving(monkeypatch, lambda node, number: node != SECOND and (node, number) != (FIRST, 2))
    run = federate(num_server_rounds=3)
    assert [list(record.failed) for record in run.rounds()] == [[], [], [CLIENT], []]
    assert run.rounds()[2].failed[CLIENT] == f"train: {GONE}; evaluate: {GONE}"
    assert run.rounds()[2].causes == {"raised": 2}


def test_a_client_that_comes_late_takes_part_from_then_on(
    federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    moving(monkeypatch, lambda node, number: node != FIRST and (node != SECOND or number > 1))
    run = federate(min_nodes=3, num_server_rounds=2)
    assert [CLIENT in record.bytes_up for record in run.rounds()] == [False, False, True]
    assert [row["client"] for row in run.clients()] == [0, 1, 2, 3]


def test_a_node_that_claims_a_client_who_is_there_waits(
    federate: Federate, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    moving(monkeypatch, lambda node, number: node != SECOND or number > 1)
    run = federate()
    assert not any(record.failed for record in run.rounds())
    assert f"node {SECOND} takes no part: client {CLIENT} is connected already" in caplog.text


def test_a_late_node_of_no_client_is_left_out_and_asked_once(
    federate: Federate, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    late = {"partition-id": 77}
    moving(monkeypatch, lambda node, number: node != SECOND or number > 1, **late)
    run = federate(num_server_rounds=3)
    assert not any(record.failed for record in run.rounds())
    assert len(run.rounds()) == 4
    assert caplog.text.count(f"node {SECOND} takes no part") == 1
