"""The one Flower Strategy that runs every method: it asks the method what to send and how to merge.

A round: participants by (seed, round) -> `method.send`, one Message each -> replies checked and in
client order -> `method.merge` -> evaluation of ALL clients -> record, checkpoint.
"""

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from pfedmoap_flwr.config import Settings
from pfedmoap_flwr.errors import RunFailed
from pfedmoap_flwr.federation.handshake import Card, check_agreement, introduce
from pfedmoap_flwr.federation.messages import num_bytes, to_arrays
from pfedmoap_flwr.federation.replies import Replies, Trained, check_evaluation, check_upload
from pfedmoap_flwr.methods.base import Method, ServerState
from pfedmoap_flwr.randomness import numpy_generator
from pfedmoap_flwr.runs import checkpoint
from pfedmoap_flwr.runs.folder import RunFolder
from pfedmoap_flwr.runs.record import Round

logger = logging.getLogger("flwr.pfedmoap")


class AllClientsFailed(RunFailed):
    """No client of a round could train; the message is the first one's traceback."""


@dataclass
class _Current:
    """The round that is under way."""

    record: Round
    started: float = field(default_factory=time.monotonic)
    replies: Replies = field(default_factory=lambda: Replies({}))
    expected: dict[int, dict[str, Tensor]] = field(default_factory=dict)


class PromptStrategy(Strategy):
    """Keeps the server's state and the map between client ids and Flower's node ids."""

    def __init__(
        self,
        settings: Settings,
        method: Method[Any, Any],
        state: ServerState,
        cards: Sequence[Card],
        folder: RunFolder,
    ) -> None:
        self.settings = settings
        self.method = method
        self.state = state
        self.cards = {card.client_id: card for card in cards}
        self.folder = folder
        self.first_round = state.round
        self.now = _Current(Round(state.round))

    def start_all(self, grid: Grid) -> Result:
        """Run the rounds that are left; before the first one, measure where clients start from."""
        timeout = self.settings.node_timeout
        if self.state.round == 0 and not self.folder.rounds():
            replies = grid.send_and_receive(self._evaluation_messages(), timeout=timeout)
            self.aggregate_evaluate(0, replies)
        left = self.settings.num_server_rounds - self.first_round
        # Flower hands these arrays from call to call; ours are in the state
        return self.start(grid, ArrayRecord(), num_rounds=left, timeout=timeout)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send every participant what the method has for it."""
        self.now = _Current(Round(self.first_round + server_round))
        self._meet_new_nodes(grid)
        sent = self.method.send(self.state, self.participants(self.now.record.round), train=True)
        for client_id, tensors in sent.items():
            self.now.record.bytes_down[client_id] = num_bytes(tensors)
            self.now.expected[client_id] = self.method.expected(self.state, tensors)
        return self._messages(MessageType.TRAIN, sent)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Merge the round's uploads in client order; failed clients are named and left out."""
        record, trained = self.now.record, dict[int, Trained]()
        for client_id, content in self.now.replies.sort(replies):
            try:
                answer = check_upload(content, client_id, self.now.expected[client_id])
            except ValueError as error:
                self.now.replies.failed[client_id] = str(error)
                continue
            trained[client_id] = answer
            record.bytes_up[client_id] = num_bytes(answer.upload.tensors)
            if answer.metrics:
                record.client_metrics[client_id] = answer.metrics
        self._report_failures("train")
        if not trained:
            raise AllClientsFailed(next(iter(self.now.replies.failures().values())))
        self.state.metrics = {}
        self.method.merge(self.state, {i: answer.upload for i, answer in trained.items()})
        self.state.round = record.round
        record.metrics = dict(self.state.metrics)
        record.train_loss = _mean_loss(trained)
        return None, None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Evaluate all clients after every n-th round and after the last one."""
        last = self.now.record.round == self.settings.num_server_rounds
        due = self.now.record.round % self.settings.eval_every == 0
        return self._evaluation_messages() if due or last else self._messages("", {})

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Write the round down: rounds.jsonl first, then the checkpoint that makes it count."""
        record = self.now.record
        for client_id, content in self.now.replies.sort(replies):
            try:
                record.clients[client_id] = check_evaluation(content, client_id)
            except ValueError as error:
                self.now.replies.failed[client_id] = str(error)
        self._report_failures("evaluate")
        if record.round == 0 and not record.clients:
            raise AllClientsFailed(next(iter(self.now.replies.failures().values())))
        record.seconds = time.monotonic() - self.now.started
        self.folder.append_round(record)
        checkpoint.save(self.state, self.folder.path)
        logger.info("%s", record.line(self.settings.num_server_rounds))
        return None

    def summary(self) -> None:
        """Say what is about to run."""
        logger.info("%s over %d clients", self.settings.method, len(self.cards))

    def participants(self, server_round: int) -> list[int]:
        """Return who trains in a round, a function of (seed, round), the same for all methods.

        Clients without training images cannot be drawn.
        """
        client_ids = sorted(card.client_id for card in self.cards.values() if card.can_train)
        count = max(1, round(self.settings.fraction_train * len(client_ids)))
        rng = numpy_generator(self.settings.seed, "participants", server_round)
        return sorted(rng.choice(client_ids, size=count, replace=False).tolist())

    def _evaluation_messages(self) -> list[Message]:
        sent = self.method.send(self.state, sorted(self.cards), train=False)
        # CLIP without any training is the same in every round
        more = {"zeroshot": self.now.record.round == 0}
        return self._messages(MessageType.EVALUATE, sent, more)

    def _messages(
        self,
        kind: str,
        sent: Mapping[int, Mapping[str, Tensor]],
        more: Mapping[str, bool] | None = None,
    ) -> list[Message]:
        server_round = self.now.record.round
        made = {}
        for client_id, tensors in sent.items():
            config = ConfigRecord(
                {"round": server_round, "run": self.folder.run_id, **(more or {})}
            )
            content = RecordDict({"arrays": to_arrays(tensors), "config": config})
            node_id = self.cards[client_id].node_id
            made[client_id] = Message(content, node_id, kind, group_id=str(server_round))
        self.now.replies = Replies(made)
        return list(made.values())

    def _meet_new_nodes(self, grid: Grid) -> None:
        """A restarted node may come back under another node id: ask it who it is."""
        known = {card.node_id for card in self.cards.values()}
        new = [node_id for node_id in grid.get_node_ids() if node_id not in known]
        if new:
            cards = introduce(grid, new, self.folder.run_id, self.settings.node_timeout)
            check_agreement(self.cards, cards)
            self.cards |= {card.client_id: card for card in cards}

    def _report_failures(self, work: str) -> None:
        for client_id, reason in self.now.replies.failures().items():
            self.now.record.failed[client_id] = f"{work}: {reason.strip().splitlines()[-1]}"
            logger.error("client %d failed to %s:\n%s", client_id, work, reason)


def _mean_loss(trained: Mapping[int, Trained]) -> float | None:
    """Return the mean weighted by n_k over the clients that trained anything."""
    weighted = [
        (answer.loss * answer.upload.num_examples, answer.upload.num_examples)
        for answer in trained.values()
        if answer.loss is not None
    ]
    return sum(loss for loss, _ in weighted) / sum(n for _, n in weighted) if weighted else None
