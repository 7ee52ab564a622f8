"""A client's three answers: who it is, its training, its evaluation."""

import functools
import json
import os
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from torch import Tensor

from pfedmoap_flwr import config, methods
from pfedmoap_flwr.clip.features import Reads, read_splits
from pfedmoap_flwr.clip.load import FrozenClip, load_clip
from pfedmoap_flwr.clip.settings import ClipSettings
from pfedmoap_flwr.config import Settings
from pfedmoap_flwr.data import SPLITS
from pfedmoap_flwr.data.catalogue import FOLDER
from pfedmoap_flwr.data.images import ImageData, load_images
from pfedmoap_flwr.data.partition import ClientRows, partition, whole
from pfedmoap_flwr.data.settings import DataSettings
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.federation import messages
from pfedmoap_flwr.methods.base import Head, Method, Task
from pfedmoap_flwr.runs.heads import KeptHeads
from pfedmoap_flwr.training import local
from pfedmoap_flwr.training.local import Split, Training

CLIENT_RAISED = 2  # Flower's code for an exception in a ClientApp

Handler = Callable[[Message, Context], RecordDict]


@dataclass(frozen=True, eq=False)
class Client:
    """One client of a run, as it stands when a message arrives."""

    rows: ClientRows
    method: Method
    clip: FrozenClip
    task: Task
    splits: dict[str, Split]
    kept: KeptHeads
    provenance: Mapping[str, Any]

    @property
    def id(self) -> int:
        """The partition id, which is the client's name everywhere."""
        return self.rows.client

    def head(self, *deliveries: dict[str, Tensor] | None) -> Head:
        """Return a fresh head that received the deliveries in turn."""
        head = self.method.build(self.clip, self.task)
        for tensors in deliveries:
            if tensors is not None:
                head.receive(tensors)
        return head

    def training(self, message: Message) -> Training:
        """Return what a train message asks for: the kept head, overwritten by what came."""
        received = messages.to_tensors(message.content["arrays"])
        head = self.head(self.kept.load(before=round_of(message)), received)
        on_device = {name: t.to(self.clip.device) for name, t in received.items()}
        return Training(self.id, head, self.splits["train"], on_device)

    def trained(self, training: Training, loss: float | None, server_round: int) -> RecordDict:
        """Keep the trained head and return the answer: what is not personal."""
        uploaded = self.method.upload(training.head, training.received)
        self.kept.save(server_round, training.head.kept())
        metrics: dict[str, int | float] = {"client": self.id, "num-examples": len(training.data)}
        if loss is not None:
            metrics["loss"] = loss
        return RecordDict(
            {"arrays": messages.to_arrays(uploaded), "metrics": MetricRecord(metrics)}
        )


def answering(handler: Handler) -> Callable[[Message, Context], Message]:
    """Turn a handler's exception into an error reply that carries the whole traceback."""

    @functools.wraps(handler)
    def reply(message: Message, context: Context) -> Message:
        try:
            return Message(handler(message, context), reply_to=message)
        except UsageError as error:
            return Message(Error(code=CLIENT_RAISED, reason=str(error)), reply_to=message)
        except Exception:
            # The server shows it: a traceback in a worker's log is never found
            reason = traceback.format_exc()
            return Message(Error(code=CLIENT_RAISED, reason=reason), reply_to=message)

    return reply


def query(message: Message, context: Context) -> RecordDict:
    """Say which client this node is, what it holds and which classes it knows."""
    client = awake(message, context)
    card: dict[str, int | str | list[str]] = {
        "client": client.id,
        "domain": client.rows.domain,
        "classnames": list(client.task.classnames),
        "template": client.task.template,
        "classes": len(client.splits["train"].labels.unique()),
        "provenance": json.dumps(dict(client.provenance)),
    }
    card |= {f"num-{split}": len(client.splits[split]) for split in SPLITS}
    return RecordDict({"card": ConfigRecord(card)})


def train(message: Message, context: Context) -> RecordDict:
    """Train on what was received and upload what is not personal; the head is kept on disk."""
    client = awake(message, context)
    training = client.training(message)
    losses = local.train(client.method, [training], round_of(message))
    return client.trained(training, losses[client.id], round_of(message))


def evaluate(message: Message, context: Context) -> RecordDict:
    """Measure the personal model (the kept head) and the global one (what was received).

    A client that never trained has the global model for its own. Round 0, which begins a run, adds
    zero-shot CLIP.
    """
    client = awake(message, context)
    server_round = round_of(message)
    received = messages.to_tensors(message.content["arrays"])
    if server_round == 0:
        client.kept.clear()
    kept = client.kept.load(before=server_round + 1)
    heads = {"global": client.head(received)}
    heads["personal"] = client.head(kept) if kept is not None else heads["global"]
    if server_round == 0:
        heads["zeroshot"] = methods.load("zeroshot")(client.method.settings).build(
            client.clip, client.task
        )
    metrics: dict[str, int | float] = {"client": client.id}
    for name, head in heads.items():
        measured = local.accuracies(head, {s: client.splits[s] for s in ("test", "validation")})
        # A split without images has no accuracy
        if "test" in measured:
            metrics[f"{name}-accuracy"] = measured["test"]
        if "validation" in measured:
            metrics[f"{name}-validation-accuracy"] = measured["validation"]
    return RecordDict({"metrics": MetricRecord(metrics)})


def round_of(message: Message) -> int:
    """Return the round that a message belongs to."""
    return int(message.content["config"]["round"])


def awake(message: Message, context: Context) -> Client:
    """Return the client that a message is for. Raises UsageError where there is none."""
    settings = config.parse(context.run_config)
    method = methods.load(settings.method)(settings)
    if "partition-id" not in context.node_config:
        raise UsageError(
            "this SuperNode has no partition-id; start it with "
            '--node-config "partition-id=0 num-partitions=2"'
        )
    number, clients = int(context.node_config["partition-id"]), settings.data.num_clients
    if number >= clients:
        raise UsageError(
            f"partition-id={number}: data.num-clients={clients} gives ids from 0 to {clients - 1}"
        )
    own_folder = str(context.node_config.get("data-dir", ""))
    node = _node_of(settings, method, number, own_folder)
    rows = node.clients[number]
    run_name = str(message.content["config"]["run"])
    folder = _state_folder(settings, context) / run_name / f"client-{number}"
    template = settings.data.template or node.images.template
    task = Task(node.images.classnames, template)
    splits = node.splits(number)
    return Client(rows, method, node.clip, task, splits, KeptHeads(folder), node.images.provenance)


def _state_folder(settings: Settings, context: Context) -> Path:
    home = Path(os.environ.get("PFEDMOAP_HOME", "~/.pfedmoap")) / "clients"
    named = str(context.node_config.get("state-dir", "")) or settings.state_dir
    return Path(named or home).expanduser()


@dataclass(frozen=True, eq=False)
class _Node:
    """What all clients of one process share, all of it frozen."""

    clip: FrozenClip
    images: ImageData
    clients: Mapping[int, ClientRows]
    features: dict[str, Tensor]

    def splits(self, client: int) -> dict[str, Split]:
        device = self.clip.device
        parts = {}
        for split, rows in self.clients[client].rows.items():
            labels = torch.from_numpy(self.images.column(split, "label")[rows])
            # On disk they may be float16, in training never
            features = self.features[split][rows].to(device, torch.float32)
            parts[split] = Split(features, labels.to(device))
        return parts


def _node_of(settings: Settings, method: Method, client: int, own_folder: str) -> "_Node":
    """Return what this process holds: all clients' images, or one's where it has its own folder."""
    shared = (settings.clip, settings.seed, settings.device, method.reads, method.views)
    if not own_folder:
        return _node(settings.data, *shared)
    try:
        data = settings.data.model_copy(update={"name": FOLDER, "path": own_folder})
        return _node(data, *shared, owner=client)
    except UsageError as error:
        raise UsageError(f"client {client}, data-dir={own_folder}: {error}") from error


@functools.lru_cache(maxsize=2)
def _node(
    data: DataSettings,
    clip: ClipSettings,
    seed: int,
    device: str,
    reads: Reads,
    views: int = 0,
    owner: int | None = None,
) -> _Node:
    """Load what a process needs; `owner`: the one client that all of its images belong to."""
    images = load_images(data)
    held = partition(images, data, seed) if owner is None else [whole(images, data, owner, seed)]
    frozen = load_clip(clip.model, clip.pretrained, device, clip.precision)
    features = read_splits(frozen, images.splits, reads, views, clip.features_dtype)
    return _Node(frozen, images, {rows.client: rows for rows in held}, features)
