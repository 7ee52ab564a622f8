"""A client's three answers: who it is, its training, its evaluation.

`answer` is the one way in: the ClientApp answers one message, an engine in one process many.
"""

import functools
import json
import logging
import os
import re
import traceback
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Error, Message, MessageType, MetricRecord, RecordDict
from torch import Tensor

from pfedmoap_flwr import config, methods
from pfedmoap_flwr.clip.features import Reading
from pfedmoap_flwr.config import Settings
from pfedmoap_flwr.data import SPLITS
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.federation import messages
from pfedmoap_flwr.methods.base import Method, Work
from pfedmoap_flwr.runs.heads import KeptHeads
from pfedmoap_flwr.settings import Value
from pfedmoap_flwr.training import local, stacked
from pfedmoap_flwr.training.exchange import make_work
from pfedmoap_flwr.training.node import Node, forget_nodes, node_of

CLIENT_RAISED = 2  # Flower's code for an exception in a ClientApp
RUN_ID = re.compile("[0-9a-f]{32}")
MEASURED = ("test", "validation")

Request = tuple[Message, Context]

logger = logging.getLogger("flwr.pfedmoap")


def answer(requests: Sequence[Request]) -> list[Message]:
    """Return the answers to messages of one type that go to different clients, in their order.

    Clients whose heads are alike train in the same steps. Where they cannot, or one of them fails,
    they train one by one. An exception becomes an error reply of its client alone.
    """
    together = len(requests) > 1 and _kind(requests[0][0]) == MessageType.TRAIN
    return _train_together(requests) if together else [_answer_one(*r) for r in requests]


@dataclass(frozen=True, eq=False)
class Client:
    """One client of a run, as it stands when a message arrives."""

    client_id: int
    node: Node
    method: Method[Any, Any]
    settings: Settings
    heads: KeptHeads

    def work(
        self, server_round: int, received: Mapping[str, Tensor], *states: Mapping[str, Tensor]
    ) -> Work[Any]:
        """Return the client's work: its head is a fresh one, overwritten by the states in turn."""
        split = functools.partial(self.node.split, self.client_id)
        return make_work(self.method, self.client_id, server_round, split, received, *states)

    def to_train(self, message: Message) -> Work[Any]:
        """Return the work of a train message: the kept head, overwritten by what came."""
        server_round = _round(message)
        received = messages.to_tensors(message.content["arrays"])
        kept = self.heads.load(before=server_round) or {}
        return self.work(server_round, received, kept, received)

    def trained(self, work: Work[Any], loss: float | None) -> RecordDict:
        """Keep the trained head and return the answer: what is not personal."""
        arrays = messages.to_arrays(self.method.upload(work))
        metrics: dict[str, int | float] = {
            "client": self.client_id,
            "num-examples": len(work.images),
        }
        if loss is not None:
            metrics["loss"] = loss
        own = self.method.metrics(work)
        metrics |= {f"{messages.METHOD_METRIC}{name}": value for name, value in own.items()}
        self.heads.save(work.round, work.head.state())
        return RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics)})


def query(client: Client, message: Message) -> RecordDict:
    """Say which client this node is, what it holds and which classes it knows."""
    federated = client.node.federated
    rows = federated.clients[client.client_id]
    labels = federated.images.column("train", "label")[rows.rows["train"]]
    card: dict[str, int | str | list[str]] = {
        "client": client.client_id,
        "domain": rows.domain,
        "classnames": list(federated.task.classnames),
        "template": federated.task.template,
        "classes": len(set(labels.tolist())),
        "provenance": json.dumps(dict(federated.images.provenance)),
    }
    card |= {f"num-{split}": len(rows.rows[split]) for split in SPLITS}
    return RecordDict({"card": ConfigRecord(card)})


def train(client: Client, message: Message) -> RecordDict:
    """Train on what was received and upload what is not personal; the head is kept on disk."""
    work = client.to_train(message)
    losses = local.train(client.method, [work])
    return client.trained(work, losses[client.client_id])


def evaluate(client: Client, message: Message) -> RecordDict:
    """Measure the global model (what was received) and the personal one (the kept head, adapted).

    A client that never trained adapts the global model. Nothing on disk is written or deleted.
    """
    server_round = _round(message)
    received = messages.to_tensors(message.content["arrays"])
    kept = client.heads.load(before=server_round + 1)
    work = client.work(server_round, received, received)
    measured = {"global": _accuracies(client, work)}
    if kept is not None:
        work = client.work(server_round, received, kept)
    client.method.adapt(work)
    measured["personal"] = _accuracies(client, work)
    if message.content["config"]["zeroshot"]:
        measured["zeroshot"] = _zeroshot(client)
    metrics: dict[str, int | float] = {"client": client.client_id}
    for model, accuracies in measured.items():
        for split, accuracy in accuracies.items():
            metrics[f"{model}-{split}-accuracy".replace("-test-", "-")] = accuracy
    return RecordDict({"metrics": MetricRecord(metrics)})


def _accuracies(client: Client, work: Work[Any]) -> dict[str, float]:
    return local.accuracies(work.head, {split: work.split(split) for split in MEASURED})


def _zeroshot(client: Client) -> dict[str, float]:
    """Measure the untouched CLIP with the data set's sentence, whatever the method reads."""
    node = client.node.reading_as(Reading("features"))
    splits = {split: node.split(client.client_id, split) for split in MEASURED}
    return local.zeroshot_accuracies(node.clip, node.federated.task, splits)


HANDLERS: dict[str, Callable[[Client, Message], RecordDict]] = {
    MessageType.QUERY: query,
    MessageType.TRAIN: train,
    MessageType.EVALUATE: evaluate,
}


def _answer_one(message: Message, context: Context) -> Message:
    try:
        content = HANDLERS[_kind(message)](open_client(message, context), message)
        return Message(content, reply_to=message)
    except UsageError as error:
        reason = str(error)
    except Exception:
        # The server shows it: nobody finds a traceback in a worker's log
        reason = traceback.format_exc()
    return Message(Error(code=CLIENT_RAISED, reason=reason), reply_to=message)


def _train_together(requests: Sequence[Request]) -> list[Message]:
    replies: dict[int, Message] = {}
    groups: dict[Hashable, dict[int, tuple[Client, Work[Any]]]] = {}
    for i, (message, context) in enumerate(requests):
        try:
            client = open_client(message, context)
            work = client.to_train(message)
        except Exception:
            # It fails in the same way again, and there becomes an error reply
            replies[i] = _answer_one(message, context)
        else:
            groups.setdefault(stacked.likeness(client.method, work), {})[i] = client, work
    for group in groups.values():
        try:
            replies |= _train_alike(group, requests)
        except Exception as error:
            logger.info("%d clients train one by one: %s", len(group), error or repr(error))
            replies |= {i: _answer_one(*requests[i]) for i in group}
    return [replies[i] for i in range(len(requests))]


def _train_alike(
    group: Mapping[int, tuple[Client, Work[Any]]], requests: Sequence[Request]
) -> dict[int, Message]:
    method = next(iter(group.values()))[0].method
    works = [work for _, work in group.values()]
    if len(works) > 1:
        stacked.check_stackable(stacked.Stack(method, works), *local.first_images(works, 2))
    losses = local.train(method, works)
    return {
        i: Message(client.trained(work, losses[client.client_id]), reply_to=requests[i][0])
        for i, (client, work) in group.items()
    }


def open_client(message: Message, context: Context) -> Client:
    """Return the client that a message is for. Raises UsageError where there is none."""
    if "partition-id" not in context.node_config:
        raise UsageError(
            "this SuperNode has no partition-id; start it with "
            '--node-config "partition-id=0 num-partitions=2"'
        )
    client_id = int(context.node_config["partition-id"])
    folder = str(context.node_config.get("data-dir", ""))
    settings, node, method = _opened(tuple(sorted(context.run_config.items())), client_id, folder)
    run_id = str(message.content["config"]["run"])
    if not RUN_ID.fullmatch(run_id):
        # It becomes the name of a folder: "../.." would lead out of the client's own
        raise UsageError(f"a message names run {run_id!r}; a run's id is 32 hexadecimal digits")
    heads = KeptHeads(_state_folder(settings, context) / run_id / f"client-{client_id}")
    return Client(client_id, node, method, settings, heads)


def _opened(
    run_config: tuple[tuple[str, Value], ...], client_id: int, folder: str
) -> tuple[Settings, Node, Method[Any, Any]]:
    settings = config.parse(dict(run_config))
    clients = settings.data.num_clients
    if client_id >= clients:
        raise UsageError(
            f"partition-id={client_id}: data.num-clients={clients} gives ids from 0 to "
            f"{clients - 1}"
        )
    # All clients of a process share one node, unless each has a folder of its own
    return _shared(run_config, client_id if folder else None, folder)


@functools.lru_cache(maxsize=2)
def _shared(
    run_config: tuple[tuple[str, Value], ...], owner: int | None, folder: str
) -> tuple[Settings, Node, Method[Any, Any]]:
    """Return what all messages of a run have in common in this process, made once."""
    settings = config.parse(dict(run_config))
    kind = methods.load(settings.method)
    reading = kind.reads(settings.own)
    node = node_of(
        settings.clip, settings.data, settings.seed, settings.device, reading, folder, owner
    )
    return settings, node, kind(settings, settings.own, node.clip, node.federated.task)


def forget_runs() -> None:
    """Free what the messages of a run have in common; the next message puts it together anew."""
    _shared.cache_clear()
    forget_nodes()


def _state_folder(settings: Settings, context: Context) -> Path:
    home = Path(os.environ.get("PFEDMOAP_HOME", "~/.pfedmoap")) / "clients"
    named = str(context.node_config.get("state-dir", "")) or settings.state_dir
    return Path(named or home).expanduser()


def _kind(message: Message) -> str:
    return message.metadata.message_type.partition(".")[0]


def _round(message: Message) -> int:
    return int(message.content["config"]["round"])
