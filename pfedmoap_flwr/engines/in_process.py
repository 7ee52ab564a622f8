"""The ServerApp and the clients' answers in this process, without Ray.

On the CPU clients run side by side in threads, each on one core: exactly what they compute one by
one. On CUDA the heads of many clients are stacked and move in the same steps.

Names that Flower does not publish are used in this file alone: Run, TaskIdentity, and a message's
id, which Flower sets where a message is sent. Checked on flwr 1.42.
"""

import logging
from collections.abc import Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import torch
from flwr.app import Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from pfedmoap_flwr.clip.load import resolve_device
from pfedmoap_flwr.config import Settings
from pfedmoap_flwr.federation import client
from pfedmoap_flwr.federation.apps import server_app
from pfedmoap_flwr.federation.client import Request
from pfedmoap_flwr.settings import Value
from pfedmoap_flwr.training import capacity, memory, stacked

RUN_ID = 1
FIRST_NODE_ID = 1000  # not the client id, as in a real federation

logger = logging.getLogger("flwr.pfedmoap")


class Workers:
    """Answers many messages at once, as many as the settings or the machine allow."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.on_cpu = resolve_device(settings.device).type == "cpu"
        self._fitting: dict[Hashable, int] = {}

    def answer(self, requests: Sequence[Request]) -> list[Message]:
        """Return the answers to messages of one type, in their order."""
        at_once = self.at_once(requests) if len(requests) > 1 else 1
        if self.on_cpu:
            return self.side_by_side(requests, at_once)
        slices = [requests[i : i + at_once] for i in range(0, len(requests), at_once)]
        return [reply for part in slices for reply in client.answer(part)]

    def at_once(self, requests: Sequence[Request]) -> int:
        """Return how many of these clients are answered at once."""
        kind = requests[0][0].metadata.message_type
        if kind == MessageType.QUERY:
            return 1
        if self.settings.clients_at_once:
            return self.settings.clients_at_once
        return self._that_fit(requests[0]) if kind == MessageType.TRAIN else capacity.cores()

    def side_by_side(self, requests: Sequence[Request], at_once: int) -> list[Message]:
        """Answer each message by itself, so many at a time in threads."""

        def one(request: Request) -> Message:
            return client.answer([request])[0]

        if at_once == 1:
            return [one(request) for request in requests]
        threads = torch.get_num_threads()
        pool = ThreadPoolExecutor(at_once, initializer=torch.set_num_threads, initargs=(1,))
        try:
            return list(pool.map(one, requests))
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)

    def _that_fit(self, request: Request) -> int:
        """Return how many clients like this one train at once, measured once for each likeness."""
        try:
            opened = client.open_client(*request)
            work = opened.to_train(request[0])
        except Exception:
            return 1  # the client's own answer says what is wrong
        likeness = stacked.likeness(opened.method, work)
        if likeness not in self._fitting:
            self._fitting[likeness] = capacity.clients_that_fit(opened.method, work)
        return self._fitting[likeness]


class InProcessGrid(Grid):
    """A grid whose nodes are function calls."""

    def __init__(self, workers: Workers, contexts: dict[int, Context]) -> None:
        self.workers = workers
        self.contexts = contexts
        self.replies: dict[str, Message] = {}

    def set_run(self, run: Run) -> None:
        """Do nothing: there is one run."""

    @property
    def run(self) -> Run:
        """The one run."""
        return Run.create_empty(RUN_ID)

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a message (Flower's older way to make one)."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the node ids."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Let every addressed node answer at once; return the message ids."""
        requests = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            requests.append((message, self.contexts[message.metadata.dst_node_id]))
        ids = [message.metadata.message_id for message, _ in requests]
        self.replies |= zip(ids, self.workers.answer(requests), strict=True)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies, once."""
        return [self.replies.pop(i) for i in list(message_ids) if i in self.replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Return the replies of all messages."""
        return self.pull_messages(self.push_messages(messages))


def run_in_process(settings: Settings) -> None:
    """Run a whole federation in this process; the ServerApp's exceptions come through."""
    # Runs that were before this one in the process must not be counted
    memory.forget_peak(resolve_device(settings.device))
    flat = settings.flat()
    clients = settings.data.num_clients
    contexts = {
        FIRST_NODE_ID + i: make_context(
            FIRST_NODE_ID + i, {"partition-id": i, "num-partitions": clients}, flat
        )
        for i in range(clients)
    }
    serve_in_process(InProcessGrid(Workers(settings), contexts), flat)


def serve_in_process(grid: InProcessGrid, run_config: dict[str, Value]) -> None:
    """Run the ServerApp over a grid of this process."""
    identify()
    server_app(grid, make_context(0, {}, run_config))


def identify() -> None:
    """Set what Message() asks for, as Flower does in the processes that it starts."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN_ID, 1


def make_context(
    node_id: int, node_config: dict[str, Value], run_config: dict[str, Value]
) -> Context:
    """Return what Flower gives an app with each message."""
    return Context(
        run_id=RUN_ID,
        node_id=node_id,
        node_config=node_config,
        state=RecordDict(),
        run_config=run_config,
    )
