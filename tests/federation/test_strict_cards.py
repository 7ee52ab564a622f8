"""A node that introduces itself badly takes no part; the others go on."""

from dataclasses import replace
from typing import Any

import pytest
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from pfedmoap_flwr.data.federated import Task
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.federation.handshake import Card, first_cards, late_card, read_card, say_data
from pfedmoap_flwr.federation.strict import Refused

PETS = Task(("cat", "dog"), "a photo of a {}.")
SAID: dict[str, Any] = {
    "client": 1,
    "domain": "photo",
    "classnames": ["cat", "dog"],
    "held-out": [],
    "template": "a photo of a {}.",
    "classes": 2,
    "provenance": '{"name": "folder", "sizes": {"train": 8, "validation": 2, "test": 4}}',
    "num-train": 8,
    "num-validation": 2,
    "num-test": 4,
}


def content(**changes: Any) -> RecordDict:
    said = {**SAID, **{k.replace("_", "-"): v for k, v in changes.items()}}
    return RecordDict({"card": ConfigRecord({k: v for k, v in said.items() if v is not None})})


def card(client_id: int, node_id: int, task: Task = PETS) -> Card:
    return replace(read_card(node_id, content(), 5), client_id=client_id, task=task)


def test_a_whole_card_is_read() -> None:
    found = read_card(77, content(), 5)
    assert (found.client_id, found.node_id, found.domain, found.task) == (1, 77, "photo", PETS)
    assert found.sizes == {"train": 8, "validation": 2, "test": 4}


@pytest.mark.parametrize(
    "changes",
    [
        *({name.replace("-", "_"): None} for name in SAID),
        {"client": -5},
        {"client": 5},
        {"client": 10**30},
        {"client": 2.7},
        {"client": "1"},
        {"classnames": []},
        {"classnames": ["cat"] * (10**5 + 1)},
        {"classnames": ["c" * 10**6, "dog"]},
        {"classnames": ["cat\n[INFO] run completed", "dog"]},
        {"classnames": "cat"},
        {"classes": 3},
        {"classes": -1},
        {"num_train": -5},
        {"num_train": 10**12},
        {"num_train": 8.0},
        {"domain": "x" * 10**6},
        {"domain": "a\nb"},
        {"provenance": "no JSON"},
        {"provenance": "[]"},
        {"provenance": "null"},
        {"provenance": "[" * 4000},
        {"provenance": '{"a": ' * 600 + "1" + "}" * 600},
        {"provenance": '{"broken": NaN}'},
        {"provenance": '{"clients": [0, 1]}'},
        {"provenance": '{"sizes": {"train": "8", "validation": 2, "test": 4}}'},
        {"provenance": '{"name": "' + "x" * 10**6 + '"}'},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_a_card_that_is_not_whole_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(Refused) as refused:
        read_card(77, content(**changes), 5)
    assert str(refused.value).isprintable()


def test_what_a_card_says_besides_is_not_read() -> None:
    found = read_card(77, content(**{"num-<script>": 3, "num-client": 9}), 5)
    assert found.sizes.keys() == {"train", "validation", "test"}


@pytest.mark.parametrize("record", [None, MetricRecord({"client": 1})])
def test_no_card_is_refused(record: Any) -> None:
    message = RecordDict({} if record is None else {"card": record})
    with pytest.raises(Refused, match="there is no ConfigRecord 'card'"):
        read_card(77, message, 5)


# Who is a client, of many cards


def test_the_classes_of_most_nodes_count_whoever_comes_first() -> None:
    other = Task(("cat", "emu"), PETS.template)
    cards, refused = first_cards([card(0, 10, other), card(1, 11), card(2, 12)])
    assert list(cards) == [1, 2]
    assert list(refused) == [10]
    assert "client 0: " in refused[10]
    assert "'dog' missing" in refused[10] or "dog" in refused[10]


def test_as_many_of_either_end_the_run() -> None:
    with pytest.raises(UsageError, match="clients 0 and 1 do not know the same classes"):
        first_cards([card(0, 10), card(1, 11, Task(("cat", "emu"), ""))])


def test_another_number_of_a_repeated_name_is_said() -> None:
    twice = Task(("cat", "dog", "dog"), "")
    cards, refused = first_cards([card(0, 10), card(1, 11), card(2, 12, twice)])
    assert list(cards) == [0, 1]
    assert "another order, number 2 is 'dog' instead of None" in refused[12]


def test_two_nodes_of_one_client_are_both_left_out() -> None:
    cards, refused = first_cards([card(0, 10), card(1, 11), card(1, 12)])
    assert list(cards) == [0]
    assert set(refused) == {11, 12}
    assert "two nodes have partition-id=1" in refused[12]


RUNNING: dict[int, Card] = {0: card(0, 10), 1: card(1, 11)}


@pytest.mark.parametrize(
    ("late", "connected", "reason"),
    [
        (card(2, 12), {10, 11, 12}, ""),
        (card(1, 12), {10, 12}, ""),
        (card(1, 12), {10, 11, 12}, "client 1 is connected already"),
        (card(2, 12, Task(("cat",), "")), {10, 11, 12}, "do not know the same classes"),
    ],
    ids=["new", "moved", "taken", "classes"],
)
def test_who_comes_in_mid_run(late: Card, connected: set[int], reason: str) -> None:
    found = late_card(late, RUNNING, connected)
    assert reason in found
    assert bool(reason) == bool(found)


def test_where_images_come_from_is_one_plain_line(caplog: pytest.LogCaptureFixture) -> None:
    origin = '{"name": "folder\\u001b[2J", "sizes": {"train": 1234, "validation": 2, "test": 4}}'
    with caplog.at_level("INFO", logger="flwr.pfedmoap"):
        say_data([read_card(77, content(provenance=origin), 5)])
    told = "images of client 1: name: folder?[2J, sizes: 1,234 train, 2 validation, 4 test"
    assert told in caplog.messages
