"""What comes back is checked before it counts: sender, names, shapes, dtypes, finite numbers."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from flwr.app import Message, RecordDict
from torch import Tensor

from pfedmoap_flwr.federation import messages
from pfedmoap_flwr.methods.base import Upload
from pfedmoap_flwr.training.exchange import check_tensors


@dataclass
class Replies:
    """The replies to one batch of messages, at most one per client.

    A reply is matched by the message it replies to: Flower's own error replies (a node that is
    gone, an expired message) do not carry the node they speak for.
    """

    expected: Mapping[int, Message]
    failed: dict[int, str] = field(default_factory=dict)
    answered: set[int] = field(default_factory=set)

    def sort(self, replies: Iterable[Message]) -> Iterator[tuple[int, RecordDict]]:
        """Yield (client_id, content) in client order; errors are kept in `failed`."""
        asked = {message.metadata.message_id: i for i, message in self.expected.items()}
        good: dict[int, RecordDict] = {}
        for reply in replies:
            client_id = asked[reply.metadata.reply_to_message_id]
            self.answered.add(client_id)
            if reply.has_error():
                self.failed[client_id] = reply.error.reason or f"error code {reply.error.code}"
            else:
                good[client_id] = reply.content
        for client_id in sorted(good):
            yield client_id, good[client_id]

    def failures(self) -> dict[int, str]:
        """Return {client_id: reason} of all that failed or never answered, in client order."""
        silent = {i: "no reply" for i in self.expected if i not in self.answered}
        return dict(sorted({**silent, **self.failed}.items()))


@dataclass(frozen=True)
class Trained:
    """A client's answer to a train message that passed all checks."""

    upload: Upload
    loss: float | None
    metrics: dict[str, float]


def check_upload(content: RecordDict, client_id: int, expected: Mapping[str, Tensor]) -> Trained:
    """Return what a client sent after training; `expected` has an example of each tensor.

    Raises ValueError where it is unfit to be merged.
    """
    metrics = content["metrics"]
    _check_sender(int(metrics["client"]), client_id)
    tensors = messages.to_tensors(content["arrays"])
    check_tensors(tensors, expected)
    loss = float(metrics["loss"]) if "loss" in metrics else None
    start = messages.METHOD_METRIC
    own = {n.removeprefix(start): float(v) for n, v in metrics.items() if n.startswith(start)}
    return Trained(Upload(tensors, int(metrics["num-examples"])), loss, own)


def check_evaluation(content: RecordDict, client_id: int) -> dict[str, float]:
    """Return {"personal-accuracy": ...} of a client. Raises ValueError for somebody else's."""
    metrics = content["metrics"]
    _check_sender(int(metrics["client"]), client_id)
    return {name: float(v) for name, v in metrics.items() if name.endswith("-accuracy")}


def _check_sender(said: int, expected: int) -> None:
    if said != expected:
        raise ValueError(f"answered as client {said}, was asked as client {expected}")
