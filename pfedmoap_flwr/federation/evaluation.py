"""A client's answer to an evaluate message: accuracies, and nothing on disk changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flwr.app import Message, MetricRecord, RecordDict

from pfedmoap_flwr.clip.features import Reading
from pfedmoap_flwr.federation import messages, scores
from pfedmoap_flwr.federation.deliveries import read_delivery
from pfedmoap_flwr.methods.base import Split, Work
from pfedmoap_flwr.training import local
from pfedmoap_flwr.training.node import Node
from pfedmoap_flwr.training.scores import Scores

if TYPE_CHECKING:
    from pfedmoap_flwr.federation.client import Client

MEASURED = ("test", "validation")


def evaluate(client: Client, message: Message) -> RecordDict:
    """Measure the global model (what was received) and the personal one (the kept head, adapted).

    A client that never trained adapts the global model. Nothing that a run reads is written or
    deleted. A node, which has no run folder beside it, leaves the personal model for its people.
    """
    if messages.said(message, "adapt"):
        return _adapted(client, message)
    server_round = client.round_of(message)
    received = read_delivery(client.method, message.content, train=False)
    kept = client.kept(message, server_round + 1)
    work = client.work(server_round, received, received)
    measured = {"global": _accuracies(client, work)}
    asked = messages.said(message, "scores") is True and client.reads_test
    scored = {"global": _scores(client, work)} if asked else {}
    work = client.personal(server_round, received, kept)
    measured["personal"] = _accuracies(client, work)
    if asked:
        scored["personal"] = _scores(client, work)
    if not client.settings.run_dir:
        client.leave_model(work)
    if messages.said(message, "zeroshot"):
        measured["zeroshot"] = _zeroshot(client)
    content = _measured(client, measured)
    if asked:
        content[scores.RECORD] = scores.to_record(scored)
    return content


def _adapted(client: Client, message: Message) -> RecordDict:
    """Measure what a client that takes no part in training makes of the common model by itself.

    It trains once, as in a round, from what was received; nothing of it is kept or uploaded.
    """
    received = read_delivery(client.method, message.content, train=True)
    work = client.work(client.round_of(message), received, received)
    if len(work.images):
        local.train(client.method, [work])
    client.method.adapt(work)
    return _measured(client, {"personal": _accuracies(client, work)})


def _measured(client: Client, measured: Mapping[str, Mapping[str, float]]) -> RecordDict:
    metrics: dict[str, int | float] = {"client": client.client_id}
    for model, accuracies in measured.items():
        for split, accuracy in accuracies.items():
            metrics[messages.accuracy_name(model, split)] = accuracy
    return RecordDict({"metrics": MetricRecord(metrics)})


def _scores(client: Client, work: Work[Any]) -> Scores:
    # The same images are drawn for each model, which makes their intervals comparable
    draws = client.method.generator("bootstrap", client.client_id, work.round)
    asked = client.settings.eval
    return scores.measure(
        client.node, work, asked, client.min_count, draws, local.blank_for(client.method)
    )


def _accuracies(client: Client, work: Work[Any]) -> dict[str, float]:
    node, blank = client.node, local.blank_for(client.method)
    found = local.accuracies(work.head, _images(client, node), blank)
    if client.novel and client.reads_test:
        novel = client.novel.work(work).head
        found |= local.accuracies(novel, {"novel": node.open_split("novel")}, blank)
    return found


def _zeroshot(client: Client) -> dict[str, float]:
    """Measure the untouched CLIP with the data set's sentence, whatever the method reads."""
    node = client.node.reading_as(Reading("features"))
    task = node.federated.task
    found = local.zeroshot_accuracies(node.clip, task, _images(client, node))
    if task.held_out and client.reads_test:
        novel = {"novel": node.open_split("novel")}
        found |= local.zeroshot_accuracies(node.clip, task.turned(), novel)
    return found


def _images(client: Client, node: Node) -> dict[str, Split]:
    """Return the images of trained classes that a client measures, by what they are called."""
    names = MEASURED if client.reads_test else MEASURED[1:]
    splits = {name: node.split(client.client_id, name) for name in names}
    if client.reads_test:
        splits |= {name: node.open_split(name) for name in node.trained_open_splits()}
    return splits
