"""The one Flower Strategy that runs every method: it asks the method what to send and how to merge.

A round: sample clients by (seed, round) -> `method.deliveries`, one Message each -> replies
checked and sorted by client -> `method.merge` -> evaluation of ALL clients -> record, checkpoint.
"""

import logging
import time
from collections.abc import Iterable

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from pfedmoap_flwr.config import Settings
from pfedmoap_flwr.federation.handshake import Card, check_agreement, introduce
from pfedmoap_flwr.federation.messages import num_bytes, to_arrays
from pfedmoap_flwr.federation.replies import Replies, check_evaluation, check_upload
from pfedmoap_flwr.methods.base import Method, Server, Upload
from pfedmoap_flwr.randomness import numpy_generator
from pfedmoap_flwr.runs import checkpoint
from pfedmoap_flwr.runs.folder import RoundRecord, RunFolder

logger = logging.getLogger("flwr.pfedmoap")


class AllClientsFailed(RuntimeError):
    """No client of a round could train; the message is the first one's traceback."""


class PromptStrategy(Strategy):
    """Keeps the Server state and the map between client ids and Flower's node ids."""

    def __init__(
        self,
        settings: Settings,
        method: Method,
        server: Server,
        cards: list[Card],
        folder: RunFolder,
    ) -> None:
        self.settings = settings
        self.method = method
        self.server = server
        self.cards = {card.client: card for card in cards}
        self.folder = folder
        self.first_round = server.round
        self.record = RoundRecord(round=server.round)
        self.replies = Replies({})
        self.started = time.monotonic()

    def start_all(self, grid: Grid) -> Result:
        """Run the rounds that are left; before the first one, measure where clients start from."""
        arrays = to_arrays(self.server.shared)
        if self.server.round == 0 and not self.folder.rounds():
            self._begin(0)
            messages = self._evaluation_messages(0)
            self.aggregate_evaluate(
                0, grid.send_and_receive(messages, timeout=self.settings.node_timeout)
            )
        left = self.settings.num_server_rounds - self.first_round
        return self.start(grid, arrays, num_rounds=left, timeout=self.settings.node_timeout)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send every sampled client its own delivery."""
        server_round += self.first_round
        self._begin(server_round)
        self._meet_new_nodes(grid)
        messages = {}
        clients = self._sample(server_round)
        for client, tensors in self.method.deliveries(self.server, clients, train=True):
            self.record.bytes_down[client] = num_bytes(tensors)
            messages[client] = self._message(client, server_round, MessageType.TRAIN, tensors)
        return self._expect(messages)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Merge the round's uploads in client order; failed clients are named and left out."""
        uploads: dict[int, Upload] = {}
        losses: dict[int, float | None] = {}
        for client, content in self.replies.sort(replies):
            try:
                upload, losses[client] = check_upload(content, client, self.server.shared)
            except ValueError as error:
                self.replies.failed[client] = str(error)
                continue
            uploads[client] = upload
            self.record.bytes_up[client] = num_bytes(upload.tensors)
        self._report_failures("train")
        if not uploads:
            raise AllClientsFailed(next(iter(self.replies.failures().values())))
        self.method.merge(self.server, uploads)
        self.server.round = self.record.round
        self.record.train_loss = _mean_loss(losses, uploads)
        return to_arrays(self.server.shared), None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Evaluate all clients after every n-th round and after the last one."""
        server_round += self.first_round
        last = server_round == self.settings.num_server_rounds
        if server_round % self.settings.eval_every and not last:
            return self._expect({})
        return self._evaluation_messages(server_round)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Write the round down: rounds.jsonl first, then the checkpoint that makes it count."""
        for client, content in self.replies.sort(replies):
            try:
                self.record.clients[client] = check_evaluation(content, client)
            except ValueError as error:
                self.replies.failed[client] = str(error)
        self._report_failures("evaluate")
        if self.record.round == 0 and not self.record.clients:
            raise AllClientsFailed(next(iter(self.replies.failures().values())))
        self.record.seconds = time.monotonic() - self.started
        self.folder.append_round(self.record)
        checkpoint.save(self.server, self.folder.path)
        logger.info("%s", self.record.line(self.settings.num_server_rounds))
        return None

    def summary(self) -> None:
        """Say what is about to run."""
        logger.info("%s over %d clients", self.settings.method, len(self.cards))

    def _begin(self, server_round: int) -> None:
        self.started = time.monotonic()
        self.record = RoundRecord(round=server_round)

    def _sample(self, server_round: int) -> list[int]:
        """Draw this round's participants, a function of (seed, round), the same for all methods.

        Clients without training images cannot be drawn.
        """
        clients = sorted(card.client for card in self.cards.values() if card.can_train)
        count = max(1, round(self.settings.fraction_train * len(clients)))
        rng = numpy_generator(self.settings.seed, "participants", server_round)
        return sorted(rng.choice(clients, size=count, replace=False).tolist())

    def _evaluation_messages(self, server_round: int) -> list[Message]:
        deliveries = self.method.deliveries(self.server, sorted(self.cards), train=False)
        return self._expect(
            {
                client: self._message(client, server_round, MessageType.EVALUATE, tensors)
                for client, tensors in deliveries
            }
        )

    def _message(self, client: int, server_round: int, kind: str, tensors: dict) -> Message:  # type: ignore[type-arg]
        config = ConfigRecord({"round": server_round, "run": self.folder.path.name})
        content = RecordDict({"arrays": to_arrays(tensors), "config": config})
        return Message(content, self.cards[client].node_id, kind, group_id=str(server_round))

    def _expect(self, messages: dict[int, Message]) -> list[Message]:
        self.replies = Replies(messages)
        return list(messages.values())

    def _meet_new_nodes(self, grid: Grid) -> None:
        """A restarted node may come back under another node id: ask it who it is."""
        known = {card.node_id for card in self.cards.values()}
        new = [node_id for node_id in grid.get_node_ids() if node_id not in known]
        if new:
            cards = introduce(grid, new, self.folder.path.name, self.settings.node_timeout)
            check_agreement(self.cards, cards)
            self.cards |= {card.client: card for card in cards}

    def _report_failures(self, work: str) -> None:
        for client, reason in self.replies.failures().items():
            self.record.failed[client] = f"{work}: {reason.strip().splitlines()[-1]}"
            logger.error("client %d failed to %s:\n%s", client, work, reason)


def _mean_loss(losses: dict[int, float | None], uploads: dict[int, Upload]) -> float | None:
    """Return the mean weighted by n_k over the clients that trained anything."""
    weighted = [
        (loss * uploads[client].num_examples, uploads[client].num_examples)
        for client, loss in losses.items()
        if loss is not None
    ]
    return sum(loss for loss, _ in weighted) / sum(n for _, n in weighted) if weighted else None
