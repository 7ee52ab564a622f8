"""A client's three answers: who it is, its training, its evaluation.

`answer` is the one way in: the ClientApp answers one message, an engine in one process many.
"""

import functools
import json
import logging
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flwr.app import ConfigRecord, Context, Error, Message, MessageType, MetricRecord, RecordDict
from torch import Tensor

from pfedmoap_flwr import config, logs, methods
from pfedmoap_flwr.config import Settings
from pfedmoap_flwr.data import SPLITS
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.federation import evaluation, messages, privacy, scores
from pfedmoap_flwr.federation.deliveries import read_delivery
from pfedmoap_flwr.federation.site_budget import KEY, SiteBudget
from pfedmoap_flwr.federation.strict import Refused
from pfedmoap_flwr.files import make_folder
from pfedmoap_flwr.methods.base import Head, Method, Work
from pfedmoap_flwr.runs.heads import MODEL, KeptHeads, folder_of, state_folder
from pfedmoap_flwr.runs.model import Model
from pfedmoap_flwr.settings import Value
from pfedmoap_flwr.training import local, memory, stacked
from pfedmoap_flwr.training.exchange import check_state, make_work, personal_work
from pfedmoap_flwr.training.node import Node, forget_nodes, node_of
from pfedmoap_flwr.training.open_classes import OtherClasses

CLIENT_RAISED = 2  # Flower's code for an exception in a ClientApp
TOLD_LETTERS = 300  # of an error's text, to the server
NAME_OF_A_FILE = re.compile(
    r"[/\\]|\.(arrow|bmp|csv|dcm|gif|jpe?g|json|npy|parquet|png|pt|safetensors|tiff?|txt|webp)\b",
    re.IGNORECASE,
)
START_OF_A_PATH = re.compile(r"([\w.-]+=)?[\"'(]?(?=~?/|\.\.?/|[A-Za-z]:\\)")

Request = tuple[Message, Context]


@dataclass(frozen=True, eq=False)
class Opened:
    """What all messages of a run have in common; `like` is an example of a head, never trained."""

    settings: Settings
    node: Node
    method: Method[Any, Any]
    like: Head
    novel: OtherClasses | None


logger = logging.getLogger("flwr.pfedmoap")


def answer(requests: Sequence[Request]) -> list[Message]:
    """Return the answers to messages of one type that go to different clients, in their order.

    Clients whose heads are alike train in the same steps. Where they cannot, or one of them fails,
    they train one by one. An exception becomes an error reply of its client alone.
    """
    together = len(requests) > 1 and _kind(requests[0][0]) == MessageType.TRAIN
    return _train_together(requests) if together else [_answer_one(*r) for r in requests]


@dataclass(frozen=True, eq=False)
class Client(Opened):
    """One client of a run, as it stands when a message arrives.

    min_count: its node's own, for scores. best: the round whose head must not be dropped, or 0.
    """

    client_id: int
    heads: KeptHeads
    budget: SiteBudget | None
    min_count: int = 0
    best: int = 0

    @property
    def reads_test(self) -> bool:
        """Whether test images may be looked at; the open splits are made of them too."""
        return self.settings.eval.split == "test"

    def work(
        self, server_round: int, received: Mapping[str, Tensor], *states: Mapping[str, Tensor]
    ) -> Work[Any]:
        """Return the client's work: its head is a fresh one, overwritten by the states in turn."""
        split = functools.partial(self.node.split, self.client_id)
        return make_work(self.method, self.client_id, server_round, split, received, *states)

    def personal(
        self, server_round: int, received: Mapping[str, Tensor], kept: Mapping[str, Tensor] | None
    ) -> Work[Any]:
        """Return the work with the client's personal model."""
        split = functools.partial(self.node.split, self.client_id)
        return personal_work(self.method, self.client_id, server_round, split, received, kept)

    def leave_model(self, work: Work[Any]) -> None:
        """Write the measured personal model; where that fails, the log says so and all goes on."""
        path = self.heads.folder / MODEL
        try:
            make_folder(path.parent)
            Model.of_work(self.method, work).save(path)
        except OSError as error:
            logger.warning("%s cannot be written (%s)", path, error.strerror or error)

    def kept(self, message: Message, before: int) -> dict[str, Tensor] | None:
        """Return the head of the last round < before that is usable, or None."""
        trained = messages.said(message, "trained")
        return self.heads.load(before=before, trained=trained if isinstance(trained, int) else 0)

    def to_train(self, message: Message) -> Work[Any]:
        """Return the work of a train message: the kept head, overwritten by what came."""
        server_round = self.round_of(message)
        if self.budget:
            self.budget.check(self.method)
        received = read_delivery(self.method, message.content, train=True)
        kept = self.kept(message, server_round) or {}
        work = self.work(server_round, received, kept, received)
        said, rounds = self.settings.optimizer, self.settings.num_server_rounds
        return replace(work, rate=said.rate(server_round, rounds))

    def round_of(self, message: Message) -> int:
        """Return the round of a message. Raises UsageError where the run has no such round."""
        said, last = messages.said(message, "round"), self.settings.num_server_rounds
        if type(said) is not int or not 0 <= said <= last:
            # It becomes a part of a file's name, by which heads are found again
            raise UsageError(
                f"a round of this run is a whole number from 0 to {last}; a message names "
                f"{str(said)[:40]!r}"
            )
        return said

    def trained(self, work: Work[Any], loss: float | None) -> RecordDict:
        """Keep the trained head and return the answer: what is not personal.

        Raises UsageError where the head is not finite or cannot be written, or the site's own
        budget is spent; the old one stays.

        With privacy neither memory, loss nor a method's own numbers go up: no noise is in them.
        """
        upload, unit = self.method.upload(work), self.settings.privacy.unit
        if unit == "client":
            upload = privacy.noised_upload(self.method, work, upload)
        metrics: dict[str, int | float] = {
            "client": self.client_id,
            "num-examples": len(work.images),
        }
        if unit == "none":
            metrics["memory"] = memory.peak(self.node.clip.device)
            if loss is not None:
                metrics["loss"] = loss
            own = self.method.metrics(work)
            metrics |= {f"{messages.METHOD_METRIC}{name}": value for name, value in own.items()}
        if self.budget:
            self.budget.charge(self.method)
        self._keep(work)
        arrays = messages.to_arrays(upload)
        return RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics)})

    def _keep(self, work: Work[Any]) -> None:
        state = work.head.state()
        try:
            check_state(state, work.head)
            self.heads.save(work.round, state, self.best)
        except ValueError as error:
            raise UsageError(
                f"after training {error}; the head of before is kept; lower the learning rate"
            ) from error
        except OSError as error:
            logger.error("client %d, %s: %s", self.client_id, self.heads.folder, error)
            raise UsageError(
                f"the trained head cannot be written ({error.strerror or type(error).__name__}); "
                "the head of before is kept; make room in the client's state folder"
            ) from error


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
        "held-out": list(federated.task.held_out),
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


HANDLERS: dict[str, Callable[[Client, Message], RecordDict]] = {
    MessageType.QUERY: query,
    MessageType.TRAIN: train,
    MessageType.EVALUATE: evaluation.evaluate,
}


def _answer_one(message: Message, context: Context) -> Message:
    return _reply(message, lambda: HANDLERS[_kind(message)](open_client(message, context), message))


def _reply(message: Message, work: Callable[[], RecordDict]) -> Message:
    """Return a reply with what the work returns, or an error reply where it raises."""
    try:
        return Message(work(), reply_to=message)
    except Exception as error:
        # With its traceback, paths and file names, which stay on this machine
        logger.error("%s failed", _kind(message), exc_info=error)
        return Message(Error(code=CLIENT_RAISED, reason=told(error)), reply_to=message)


def told(error: Exception) -> str:
    """Return what the server is told of a client's error: its kind and one line without paths.

    Names of image files are names of patients. So a text is cut where a path begins, and left out
    where it has a file's name in it that may have begun before.
    """
    text = (error.strerror or "") if isinstance(error, OSError) else str(error)
    text = " ".join(text.split())
    if found := NAME_OF_A_FILE.search(text):
        word = text.rfind(" ", 0, found.start()) + 1
        begins = START_OF_A_PATH.match(text, word)
        text = f"{text[: begins.end()] if begins else ''}... (the rest is in the client's log)"
    kind = "" if isinstance(error, UsageError | Refused) else f"{type(error).__name__}: "
    return f"{kind}{text[:TOLD_LETTERS]}".rstrip(" :")


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
        i: _reply(requests[i][0], functools.partial(each.trained, work, losses[each.client_id]))
        for i, (each, work) in group.items()
    }


def open_client(message: Message, context: Context) -> Client:
    """Return the client that a message is for. Raises UsageError where there is none."""
    if "partition-id" not in context.node_config:
        raise UsageError(
            "this SuperNode has no partition-id; start it with "
            '--node-config "partition-id=0 num-partitions=2"'
        )
    client_id = context.node_config["partition-id"]
    if type(client_id) is not int or client_id < 0:
        raise UsageError(f"partition-id={client_id!r}: must be a whole number >= 0")
    folder = str(context.node_config.get("data-dir", ""))
    opened = _opened(tuple(sorted(context.run_config.items())), client_id, folder)
    state = state_folder(str(context.node_config.get("state-dir", "")) or opened.settings.state_dir)
    heads = KeptHeads(folder_of(state, messages.said(message, "run"), client_id), opened.like)
    best = messages.said(message, "best")
    return Client(
        **vars(opened),
        client_id=client_id,
        heads=heads,
        budget=SiteBudget.of(context.node_config.get(KEY), state, client_id),
        min_count=scores.own_min_count(context),
        best=best if type(best) is int else 0,
    )


def _opened(run_config: tuple[tuple[str, Value], ...], client_id: int, folder: str) -> Opened:
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
def _shared(run_config: tuple[tuple[str, Value], ...], owner: int | None, folder: str) -> Opened:
    """Return what all messages of a run have in common in this process, made once."""
    settings = config.parse(dict(run_config))
    logs.set_up(settings.log_format)
    reading = methods.load(settings.method).reads(settings.own)
    node = node_of(
        settings.clip, settings.data, settings.seed, settings.device, reading, folder, owner
    )
    task = node.federated.task
    method = methods.make(settings.method, settings, settings.own, node.clip, task)
    return Opened(settings, node, method, method.build(), _novel(method))


def _novel(method: Method[Any, Any]) -> OtherClasses | None:
    """Return what measures classes that nobody trains, where there are any and the method can."""
    if not method.task.held_out:
        return None
    try:
        return OtherClasses(method, method.task.turned())
    except ValueError as error:
        logger.warning("no accuracy on novel classes: %s", error)
        return None


def forget_runs() -> None:
    """Free what the messages of a run have in common; the next message puts it together anew."""
    _shared.cache_clear()
    forget_nodes()


def _kind(message: Message) -> str:
    return message.metadata.message_type.partition(".")[0]
