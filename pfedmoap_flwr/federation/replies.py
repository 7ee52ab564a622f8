"""What comes back is checked before it counts: sender, names, shapes, dtypes, numbers, sizes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from flwr.app import Message, MetricRecord, RecordDict
from torch import Tensor

from pfedmoap_flwr.federation import messages, strict
from pfedmoap_flwr.federation.messages import num_bytes
from pfedmoap_flwr.federation.strict import Refused
from pfedmoap_flwr.methods.base import Upload
from pfedmoap_flwr.runs.record import Round

LARGEST_LOSS = 1e9
LARGEST_MEMORY = 2**50
MOST_METRICS = 100


@dataclass
class Replies:
    """The replies to one batch of messages, at most one per client.

    A reply is matched by the message it replies to: Flower's own error replies (a node that is
    gone, an expired message) do not carry the node they speak for. A client's first answer counts,
    and one to a message that nobody sent is none.
    """

    expected: Mapping[int, Message]
    failed: dict[int, str] = field(default_factory=dict)
    refused: set[int] = field(default_factory=set)
    answered: set[int] = field(default_factory=set)

    def sort(self, replies: Iterable[Message]) -> Iterator[tuple[int, RecordDict]]:
        """Yield (client_id, content) in client order; errors are kept in `failed`."""
        asked = {message.metadata.message_id: i for i, message in self.expected.items()}
        good: dict[int, RecordDict] = {}
        for reply in replies:
            client_id = asked.get(reply.metadata.reply_to_message_id)
            if client_id is None or client_id in self.answered:
                continue
            self.answered.add(client_id)
            if reply.has_error():
                reason = strict.shown(reply.error.reason or "")
                self.failed[client_id] = reason or f"error code {reply.error.code}"
            else:
                good[client_id] = reply.content
        for client_id in sorted(good):
            yield client_id, good[client_id]

    def refuse(self, client_id: int, error: Exception) -> None:
        """Leave a client's answer out; whatever it made of the reader is its own fault alone."""
        reason = str(error) if isinstance(error, Refused) else type(error).__name__
        self.failed[client_id] = f"refused: {strict.shown(reason)}"
        self.refused.add(client_id)

    def failures(self) -> dict[int, str]:
        """Return {client_id: reason} of all that failed or never answered, in client order."""
        silent = dict.fromkeys(self.silent(), "no reply")
        return dict(sorted({**silent, **self.failed}.items()))

    def causes(self) -> dict[str, int]:
        """Return how many failed by cause: "refused", "raised" or "no reply"; none that did not."""
        found = {
            "refused": len(self.refused),
            "raised": len(self.failed.keys() - self.refused),
            "no reply": len(self.silent()),
        }
        return {cause: count for cause, count in found.items() if count}

    def silent(self) -> set[int]:
        """Return the clients that never answered."""
        return self.expected.keys() - self.answered


@dataclass(frozen=True)
class Trained:
    """A client's answer to a train message that passed all checks.

    memory: the most bytes that its process has held; None where privacy keeps it back.
    """

    upload: Upload
    loss: float | None
    memory: int | None
    metrics: dict[str, float]

    def enter(self, record: Round, client_id: int) -> None:
        """Write down what the client sent, less its tensors."""
        record.bytes_up[client_id] = num_bytes(self.upload.tensors)
        if self.memory is not None:
            record.memory[client_id] = self.memory
        if self.metrics:
            record.client_metrics[client_id] = self.metrics


def check_upload(
    content: RecordDict, client_id: int, expected: Mapping[str, Tensor], most: int
) -> Trained:
    """Return what a client sent after training; `expected` has an example of each tensor.

    most: how many training images it said it has; no upload weighs more.

    Raises Refused where it is unfit to be merged.
    """
    metrics = strict.record(content, "metrics", MetricRecord)
    _check_sender(metrics, client_id)
    num_examples = strict.whole(metrics, "num-examples", 1, most)
    loss = None
    if "loss" in metrics:
        loss = strict.number(metrics, "loss", -LARGEST_LOSS, LARGEST_LOSS)
    memory = strict.whole(metrics, "memory", 0, LARGEST_MEMORY) if "memory" in metrics else None
    own = [name for name in metrics if name.startswith(messages.METHOD_METRIC)]
    if len(own) > MOST_METRICS or not all(strict.NAME.fullmatch(name) for name in own):
        raise Refused(f"its metrics are more than {MOST_METRICS}, or have odd names")
    values = {
        name.removeprefix(messages.METHOD_METRIC): strict.number(
            metrics, name, -strict.LARGEST, strict.LARGEST
        )
        for name in own
    }
    return Trained(Upload(strict.tensors(content, expected), num_examples), loss, memory, values)


def check_evaluation(content: RecordDict, client_id: int, names: Sequence[str]) -> dict[str, float]:
    """Return {"personal-accuracy": ...} of a client, each from 0 to 1; `names` are all there are.

    Raises Refused for somebody else's, or anything else.
    """
    metrics = strict.record(content, "metrics", MetricRecord)
    _check_sender(metrics, client_id)
    if odd := metrics.keys() - {"client", *names}:
        raise Refused(f"there is no accuracy {strict.shown(sorted(odd)[0], 60)!r}")
    return {name: strict.number(metrics, name, 0, 1) for name in names if name in metrics}


def too_far(
    trained: Mapping[int, Trained], sent: Mapping[int, Mapping[str, Tensor]], factor: float
) -> dict[int, str]:
    """Return why uploads are refused whose step from what was sent is far longer than others'.

    A step is longer than `factor` times the median over clients, in some tensor, and longer than
    what was sent is: a layer that is dead at most clients and learns at a few would else refuse
    these. With one or two clients nobody can say which is the wrong one. factor 0: none is.
    """
    if not factor:
        return {}
    reasons: dict[int, str] = {}
    steps: dict[str, dict[int, float]] = {}
    for client_id, answer in trained.items():
        for name, after in answer.upload.tensors.items():
            before = sent[client_id].get(name)
            if before is not None and before.shape == after.shape and after.is_floating_point():
                step = float((after.double() - before.double()).norm())
                steps.setdefault(name, {})[client_id] = step
    for name, lengths in steps.items():
        usual = median(lengths.values())
        for client_id, length in lengths.items():
            beyond_others = usual > 0 and length > factor * usual
            if beyond_others and length > float(sent[client_id][name].double().norm()):
                reasons[client_id] = (
                    f"{name} moved {length:.3g}, more than {factor:g} times the median "
                    f"{usual:.3g} (server.max-step)"
                )
    return reasons


def _check_sender(metrics: MetricRecord, client_id: int) -> None:
    said = strict.whole(metrics, "client", 0, strict.MOST_CLIENTS)
    if said != client_id:
        raise Refused(f"answered as client {said}, was asked as client {client_id}")
