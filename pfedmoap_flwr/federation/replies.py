"""What comes back is checked before it counts: sender, names, shapes, finite numbers."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from flwr.app import Message, RecordDict
from torch import Tensor

from pfedmoap_flwr.federation import messages
from pfedmoap_flwr.methods.base import Upload


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
        """Yield (client, content) in client order; errors are kept in `failed`."""
        asked = {message.metadata.message_id: c for c, message in self.expected.items()}
        good: dict[int, RecordDict] = {}
        for reply in replies:
            client = asked[reply.metadata.reply_to_message_id]
            self.answered.add(client)
            if reply.has_error():
                self.failed[client] = reply.error.reason or f"error code {reply.error.code}"
            else:
                good[client] = reply.content
        for client in sorted(good):
            yield client, good[client]

    def failures(self) -> dict[int, str]:
        """Return {client: reason} of all that failed or never answered, in client order."""
        silent = {client: "no reply" for client in self.expected if client not in self.answered}
        return dict(sorted({**silent, **self.failed}.items()))


def check_upload(
    content: RecordDict, client: int, shared: Mapping[str, Tensor]
) -> tuple[Upload, float | None]:
    """Return a client's upload and its training loss, if any. Raises ValueError where unfit."""
    metrics = content["metrics"]
    _check_sender(int(metrics["client"]), client)
    tensors = messages.to_tensors(content["arrays"])
    if tensors.keys() != shared.keys():
        raise ValueError(f"uploaded {sorted(tensors)}, not {sorted(shared)}")
    for name, tensor in tensors.items():
        if tensor.shape != shared[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, not {tuple(shared[name].shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} is not finite; lower the learning rate")
    loss = float(metrics["loss"]) if "loss" in metrics else None
    return Upload(tensors, int(metrics["num-examples"])), loss


def check_evaluation(content: RecordDict, client: int) -> dict[str, float]:
    """Return {"personal-accuracy": ...} of a client. Raises ValueError for somebody else's."""
    metrics = content["metrics"]
    _check_sender(int(metrics["client"]), client)
    return {name: float(v) for name, v in metrics.items() if name.endswith("-accuracy")}


def _check_sender(said: int, expected: int) -> None:
    if said != expected:
        raise ValueError(f"answered as client {said}, was asked as client {expected}")
