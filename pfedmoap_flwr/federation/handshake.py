"""Who is there: nodes introduce themselves, and everything else is keyed by client id."""

import logging
import time
from dataclasses import dataclass
from typing import Any

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods import Task

POLL_SECONDS = 0.5
STEADY_SECONDS = 3.0
logger = logging.getLogger("flwr.pfedmoap")


@dataclass(frozen=True)
class Card:
    """How a client introduced itself."""

    client: int
    node_id: int
    domain: str
    task: Task
    sizes: dict[str, int]


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


def introduce(grid: Grid, node_ids: list[int], run_name: str, timeout: float) -> list[Card]:
    """Ask nodes who they are; cards come back in client order.

    Raises UsageError where a node fails, two nodes are the same client, or their classes differ.
    """
    config = {"run": run_name}
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
    return sorted(cards, key=lambda card: card.client)


def check_agreement(cards: dict[int, Card], new: list[Card]) -> None:
    """Raise UsageError where a new card contradicts those known, or each other."""
    known = dict(cards)
    for card in new:
        twin = known.get(card.client)
        if twin is not None and twin.node_id != card.node_id and card.client not in cards:
            raise UsageError(f"two nodes have partition-id={card.client}; give each its own")
        known[card.client] = card
        first = next(iter(known.values()))
        if card.task.classnames != first.task.classnames:
            differing = set(card.task.classnames) ^ set(first.task.classnames)
            what = ", ".join(sorted(differing)) or "their order"
            raise UsageError(
                f"clients {first.client} and {card.client} do not know the same classes: {what}"
            )


def _card(node_id: int, record: Any) -> Card:
    return Card(
        client=int(record["client"]),
        node_id=node_id,
        domain=str(record["domain"]),
        task=Task(tuple(record["classnames"]), str(record["template"])),
        sizes={k.removeprefix("num-"): int(v) for k, v in record.items() if k.startswith("num-")},
    )
