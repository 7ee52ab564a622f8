"""Who is there: nodes introduce themselves, and everything else is keyed by client id."""

import itertools
import json
import logging
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from pfedmoap_flwr.data import SPLITS
from pfedmoap_flwr.data.federated import Task
from pfedmoap_flwr.data.labels import difference
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.federation import strict
from pfedmoap_flwr.federation.strict import Refused

POLL_SECONDS = 0.5
STEADY_SECONDS = 3.0
SHOWN_CLIENTS = 10
MOST_CLASSES, MOST_IMAGES = 10**5, 10**8
NAME_LENGTH, TEXT_LENGTH = 200, 4096
logger = logging.getLogger("flwr.pfedmoap")


@dataclass(frozen=True)
class Card:
    """How a client introduced itself; `classes`: how many of them it trains on."""

    client_id: int
    node_id: int
    domain: str
    task: Task
    sizes: dict[str, int]
    classes: int
    provenance: dict[str, Any]

    @property
    def can_train(self) -> bool:
        """Whether the client has any training images."""
        return self.sizes["train"] > 0


def wait_for_nodes(grid: Grid, at_least: int, at_most: int, timeout: float) -> None:
    """Wait until `at_most` nodes are connected, or `at_least` and no new one for a while.

    Raises UsageError when the time is over.
    """
    deadline = time.monotonic() + timeout
    count, since = 0, time.monotonic()
    while (now := time.monotonic()) < deadline:
        connected = len(list(grid.get_node_ids()))
        if connected != count:
            count, since = connected, now
            logger.info("%d of up to %d nodes connected", count, at_most)
        if count >= at_most or (count >= at_least and now - since >= STEADY_SECONDS):
            return
        time.sleep(POLL_SECONDS)
    raise UsageError(
        f"only {count} SuperNodes connected within {timeout:g} s; setting min-nodes={at_least}: "
        "start more or lower it"
    )


def introduce(
    grid: Grid, node_ids: Sequence[int], run_id: str, clients: int, timeout: float
) -> tuple[list[Card], dict[int, str]]:
    """Ask nodes who they are: cards in client order, and why the other nodes have none.

    clients: how many there are; a client's id is below.
    """
    asked = [
        Message(RecordDict({"config": ConfigRecord({"run": run_id})}), node_id, MessageType.QUERY)
        for node_id in node_ids
    ]
    cards: dict[int, Card] = {}
    refused: dict[int, str] = {}
    replies = list(grid.send_and_receive(asked, timeout=timeout))
    # Flower fills the ids in where a message is sent
    node_of = {m.metadata.message_id: m.metadata.dst_node_id for m in asked}
    for reply in replies:
        node_id = node_of.get(reply.metadata.reply_to_message_id)
        if node_id is None or node_id in cards or node_id in refused:
            continue
        try:
            if reply.has_error():
                raise Refused(reply.error.reason or f"error code {reply.error.code}")
            cards[node_id] = read_card(node_id, reply.content, clients)
        except Exception as error:  # a node's answer is that node's fault alone
            known = isinstance(error, Refused)
            refused[node_id] = strict.shown(error if known else type(error).__name__)
    silent = set(node_ids) - cards.keys() - refused.keys()
    refused |= dict.fromkeys(sorted(silent), f"no answer within {timeout:g} s")
    return sorted(cards.values(), key=lambda card: card.client_id), refused


def first_cards(cards: Sequence[Card]) -> tuple[dict[int, Card], dict[int, str]]:
    """Return the clients of a run by id, and why the nodes of other cards are left out.

    All clients must know the same classes; those of the most nodes count.

    Raises UsageError where as many nodes know others.
    """
    refused: dict[int, str] = {}
    nodes: dict[int, list[Card]] = {}
    for card in cards:
        nodes.setdefault(card.client_id, []).append(card)
    twins = [c for same in nodes.values() if len(same) > 1 for c in same]
    for card in twins:
        refused[card.node_id] = f"two nodes have partition-id={card.client_id}; give each its own"
    left = [card for card in cards if card not in twins]
    ranked = Counter(card.task.all_classnames for card in left).most_common(2)
    usual = next((c for c in left if c.task.all_classnames == ranked[0][0]), None)
    for card in left:
        if usual is None or not (reason := _other_classes(card, usual)):
            continue
        if ranked[0][1] == ranked[1][1]:
            raise UsageError(reason)
        refused[card.node_id] = reason
    return {c.client_id: c for c in left if c.node_id not in refused}, refused


def late_card(card: Card, cards: Mapping[int, Card], connected: Collection[int]) -> str:
    """Return why a node that came in mid-run does not take part, or "".

    A client that is there already may move to another node only when its old one is gone: otherwise
    a stranger could take over its upload and what it is sent.
    """
    first = next(iter(cards.values()))
    if reason := _other_classes(card, first):
        return reason
    before = cards.get(card.client_id)
    if before is not None and before.node_id in connected:
        return f"client {card.client_id} is connected already"
    return ""


def say_left_out(node_id: int, reason: str) -> None:
    """Log why a node takes no part."""
    logger.warning("node %d takes no part: %s", node_id, reason)


def _other_classes(card: Card, usual: Card) -> str:
    mine, theirs = card.task.all_classnames, usual.task.all_classnames
    if mine == theirs:
        return ""
    missing, extra = set(theirs) - set(mine), set(mine) - set(theirs)
    said = difference(missing, extra) or _order(mine, theirs)
    return (
        f"clients {usual.client_id} and {card.client_id} do not know the same classes; "
        f"client {card.client_id}: {said}; give all nodes one list with setting data.classnames"
    )


def say_data(cards: Iterable[Card]) -> None:
    """Log where the images come from, and which clients cannot do all that others do.

    Raises UsageError where no client has anything to train on.
    """
    cards = list(cards)
    for clients, origin in origins(cards):
        logger.info("images of %s: %s", _clients(clients), _in_words(origin))
    lacking = {
        "no training images, so no part in training": [c for c in cards if not c.can_train],
        "no test images, so no accuracy": [c for c in cards if not c.sizes["test"]],
        "training images of one class only": [c for c in cards if c.classes == 1],
        "broken images that were skipped": [c for c in cards if c.provenance.get("broken")],
    }
    for what, those in lacking.items():
        if those:
            logger.warning("%s: %s", _clients([card.client_id for card in those]), what)
    if not any(card.can_train for card in cards):
        raise UsageError("no client has training images")


def origins(cards: Iterable[Card]) -> list[tuple[list[int], dict[str, Any]]]:
    """Return what nodes say of where their images come from, with the clients that say so."""
    found: dict[str, list[int]] = {}
    for card in cards:
        found.setdefault(json.dumps(card.provenance), []).append(card.client_id)
    return [(clients, json.loads(text)) for text, clients in found.items()]


def _in_words(origin: Mapping[str, Any]) -> str:
    """Return a provenance as a line for people."""

    def told(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{number:,} {name}" for name, number in value.items())
        return strict.shown(value)

    return ", ".join(f"{strict.shown(name)}: {told(value)}" for name, value in origin.items())


def _clients(clients: list[int]) -> str:
    shown = ", ".join(map(str, clients[:SHOWN_CLIENTS]))
    more = f" and {len(clients) - SHOWN_CLIENTS} more" if len(clients) > SHOWN_CLIENTS else ""
    return f"client{'s' * (len(clients) > 1)} {shown}{more}"


def _order(mine: tuple[str, ...], theirs: tuple[str, ...]) -> str:
    pairs = itertools.zip_longest(mine, theirs)
    number, (one, other) = next((i, p) for i, p in enumerate(pairs) if p[0] != p[1])
    return f"another order, number {number} is {one!r} instead of {other!r}"


def read_card(node_id: int, content: RecordDict, clients: int) -> Card:
    """Return how a node introduced itself. Raises Refused for anything but a whole card."""
    said = strict.record(content, "card", ConfigRecord)
    classnames = strict.texts(said, "classnames", MOST_CLASSES, NAME_LENGTH)
    held_out = strict.texts(said, "held-out", MOST_CLASSES, NAME_LENGTH)
    if not classnames:
        raise Refused("it knows no classes")
    return Card(
        client_id=strict.whole(said, "client", 0, clients - 1),
        node_id=node_id,
        domain=strict.text(said, "domain", NAME_LENGTH),
        task=Task(classnames, strict.text(said, "template", TEXT_LENGTH), held_out),
        sizes={split: strict.whole(said, f"num-{split}", 0, MOST_IMAGES) for split in SPLITS},
        classes=strict.whole(said, "classes", 0, len(classnames)),
        provenance=_provenance(strict.text(said, "provenance", TEXT_LENGTH)),
    )


def _provenance(said: str) -> dict[str, Any]:
    """Return where a node's images come from: one object of plain values, or of plain sizes."""
    try:
        found = json.loads(said, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise Refused("provenance is no JSON") from error
    flat = isinstance(found, dict) and all(
        isinstance(value, str | int | float | None) or (key == "sizes" and _are_sizes(value))
        for key, value in found.items()
    )
    if not flat or "clients" in found:
        raise Refused("provenance is no object of plain values")
    return dict(found)


def _are_sizes(value: object) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == set(SPLITS)
        and all(isinstance(size, int) for size in value.values())
    )


def _no_number(constant: str) -> float:
    raise ValueError(constant)
