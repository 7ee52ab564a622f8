"""Who is there: nodes introduce themselves, and everything else is keyed by client id."""

import json
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from pfedmoap_flwr.data.federated import Task
from pfedmoap_flwr.data.labels import difference
from pfedmoap_flwr.errors import UsageError

POLL_SECONDS = 0.5
STEADY_SECONDS = 3.0
SHOWN_CLIENTS = 10
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


def introduce(grid: Grid, node_ids: list[int], run_id: str, timeout: float) -> list[Card]:
    """Ask nodes who they are; cards come back in client order.

    Raises UsageError where a node fails, two nodes are the same client, or their classes differ.
    """
    config = {"run": run_id}
    messages = [
        Message(RecordDict({"config": ConfigRecord(dict(config))}), node_id, MessageType.QUERY)
        for node_id in node_ids
    ]
    cards = []
    for reply in grid.send_and_receive(messages, timeout=timeout):
        if reply.has_error():
            raise UsageError(f"a node could not introduce itself: {reply.error.reason}")
        cards.append(_card(reply.metadata.src_node_id, reply.content["card"]))
    if len(cards) < len(node_ids):
        silent = len(node_ids) - len(cards)
        raise UsageError(f"{silent} of {len(node_ids)} nodes did not answer within {timeout:g} s")
    return sorted(cards, key=lambda card: card.client_id)


def check_agreement(cards: dict[int, Card], new: list[Card]) -> None:
    """Raise UsageError where a new card contradicts those known, or each other."""
    known = dict(cards)
    for card in new:
        twin = known.get(card.client_id)
        if twin is not None and twin.node_id != card.node_id and card.client_id not in cards:
            raise UsageError(f"two nodes have partition-id={card.client_id}; give each its own")
        known[card.client_id] = card
        first = next(iter(known.values()))
        if card.task.classnames != first.task.classnames:
            mine, theirs = card.task.classnames, first.task.classnames
            missing, extra = set(theirs) - set(mine), set(mine) - set(theirs)
            raise UsageError(
                f"clients {first.client_id} and {card.client_id} do not know the same classes; "
                f"client {card.client_id}: {difference(missing, extra) or _order(mine, theirs)}; "
                "give all nodes one list with setting data.classnames"
            )


def say_data(cards: Iterable[Card]) -> None:
    """Log where the images come from, and which clients cannot do all that others do.

    Raises UsageError where no client has anything to train on.
    """
    cards = list(cards)
    for clients, origin in origins(cards):
        logger.info("images of %s: %s", _clients(clients), json.dumps(origin))
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


def _clients(clients: list[int]) -> str:
    shown = ", ".join(map(str, clients[:SHOWN_CLIENTS]))
    more = f" and {len(clients) - SHOWN_CLIENTS} more" if len(clients) > SHOWN_CLIENTS else ""
    return f"client{'s' * (len(clients) > 1)} {shown}{more}"


def _order(mine: tuple[str, ...], theirs: tuple[str, ...]) -> str:
    pairs = zip(mine, theirs, strict=True)
    number, (one, other) = next((i, p) for i, p in enumerate(pairs) if p[0] != p[1])
    return f"another order, number {number} is {one!r} instead of {other!r}"


def _card(node_id: int, record: Any) -> Card:
    return Card(
        client_id=int(record["client"]),
        node_id=node_id,
        domain=str(record["domain"]),
        task=Task(tuple(record["classnames"]), str(record["template"])),
        sizes={k.removeprefix("num-"): int(v) for k, v in record.items() if k.startswith("num-")},
        classes=int(record["classes"]),
        provenance=json.loads(str(record["provenance"])),
    )
