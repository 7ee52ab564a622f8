"""The same ServerApp and ClientApp without Ray: every client runs in this process."""

from collections.abc import Callable, Iterable
from uuid import uuid4

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from pfedmoap_flwr.federation.parallel import answer_all
from pfedmoap_flwr.settings import Value

RUN_ID = 1
FIRST_NODE_ID = 1000  # not the client id, as in a real federation


class InProcessGrid(Grid):
    """A grid whose nodes are function calls."""

    def __init__(
        self, client_app: Callable[[Message, Context], Message], contexts: dict[int, Context]
    ) -> None:
        self._client_app = client_app
        self._contexts = contexts
        self._replies: dict[str, Message] = {}

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
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Let every addressed node answer at once; return the message ids."""
        requests = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            requests.append((message, self._contexts[message.metadata.dst_node_id]))
        ids = [message.metadata.message_id for message, _ in requests]
        self._replies |= zip(ids, answer_all(self._client_app, requests), strict=True)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies, once."""
        return [self._replies.pop(i) for i in list(message_ids) if i in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Return the replies of all messages."""
        return self.pull_messages(self.push_messages(messages))


def run_in_process(
    server_app: ServerApp, client_app: ClientApp, run_config: dict[str, Value], num_clients: int
) -> None:
    """Run a whole federation in this process; the ServerApp's exceptions come through."""
    # Message() asks for these, which Flower sets in the processes that it starts
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN_ID, 1
    contexts = {
        FIRST_NODE_ID + client: _context(
            FIRST_NODE_ID + client,
            {"partition-id": client, "num-partitions": num_clients},
            run_config,
        )
        for client in range(num_clients)
    }
    server_app(InProcessGrid(client_app, contexts), _context(0, {}, run_config))


def _context(node_id: int, node_config: dict[str, Value], run_config: dict[str, Value]) -> Context:
    return Context(
        run_id=RUN_ID,
        node_id=node_id,
        node_config=node_config,
        state=RecordDict(),
        run_config=run_config,
    )
