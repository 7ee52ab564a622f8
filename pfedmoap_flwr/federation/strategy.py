"""The one Flower Strategy that runs every method: it asks the method what to send and how to merge.

A round: participants by (seed, round) -> `method.send`, one Message each -> replies checked and in
client order -> `method.merge` -> evaluation of ALL clients -> record, checkpoint.
"""

import logging
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from pfedmoap_flwr.config import Settings
from pfedmoap_flwr.errors import RunFailed
from pfedmoap_flwr.federation import sanity
from pfedmoap_flwr.federation.exporter import Exporter
from pfedmoap_flwr.federation.handshake import Card, introduce, late_card, say_left_out
from pfedmoap_flwr.federation.messages import ACCURACIES, num_bytes, to_arrays
from pfedmoap_flwr.federation.privacy import Ledger, in_place_of_each
from pfedmoap_flwr.federation.replies import (
    Replies,
    Trained,
    check_evaluation,
    check_upload,
    too_far,
)
from pfedmoap_flwr.federation.scores import check_scores
from pfedmoap_flwr.federation.strict import Refused
from pfedmoap_flwr.methods.base import Method, ServerState
from pfedmoap_flwr.randomness import numpy_generator
from pfedmoap_flwr.runs.choice import best_round
from pfedmoap_flwr.runs.folder import RunFolder
from pfedmoap_flwr.runs.record import Round
from pfedmoap_flwr.tracking import Tracker
from pfedmoap_flwr.training.elsewhere import OtherSet

logger = logging.getLogger("flwr.pfedmoap")


class TooFewReplies(RunFailed):
    """Too few clients of a round answered as they should; names the first one's reason."""


@dataclass
class _Current:
    """The round that is under way, and what was sent to whom."""

    record: Round
    attempt: int = 0
    started: float = field(default_factory=time.monotonic)
    replies: Replies = field(default_factory=lambda: Replies({}))
    sent: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)


class PromptStrategy(Strategy):
    """Keeps the server's state and the map between client ids and Flower's node ids.

    left_out: why nodes that are connected take no part, by node id. others: data sets that the
    common model is measured on at the end. told: who takes the numbers of each round.
    """

    def __init__(
        self,
        settings: Settings,
        method: Method[Any, Any],
        state: ServerState,
        cards: Mapping[int, Card],
        left_out: Mapping[int, str],
        folder: RunFolder,
        told: Sequence[Exporter | Tracker],
        others: Sequence[OtherSet] = (),
    ) -> None:
        self.settings = settings
        self.method = method
        self.state = state
        self.cards = dict(cards)
        self.left_out = dict(left_out)
        self.folder = folder
        self.told = told
        self.others = others
        self.trained: dict[int, int] = {}
        self.now = _Current(Round(state.round))
        self.refusals = Counter[int]()
        self.rounds: list[Round] = []
        self.best = 0
        self._late: dict[int, Card] = {}
        self.privacy = settings.privacy
        self.ledger: Ledger | None = None
        if self.privacy.unit != "none":
            self.ledger = Ledger(method, state, settings.data.num_clients)

    def check_budget(self) -> None:
        """Raise UsageError where the rounds that are left would spend more than privacy.budget."""
        if self.ledger:
            self.ledger.check(self.settings.num_server_rounds, self.participants)

    def start_all(self, grid: Grid) -> None:
        """Run the rounds that are left; before the first one, measure where clients start from.

        Flower's own `start` gives up a round whose clients fail; here it is tried again.
        """
        self.rounds = self.folder.rounds()
        self._find_best()
        for record in self.rounds:
            self.trained |= dict.fromkeys(record.bytes_up, record.round)
        self.summary()
        timeout = self.settings.node_timeout
        if self.state.round == 0 and not self.rounds:
            replies = grid.send_and_receive(self._evaluation_messages(), timeout=timeout)
            self.aggregate_evaluate(0, replies)
        arrays, config = ArrayRecord(), ConfigRecord()  # ours are in the state
        for number in range(self.state.round + 1, self.settings.num_server_rounds + 1):
            self.now = _Current(Round(number))
            while True:
                messages = self.configure_train(number, arrays, config, grid)
                try:
                    self.aggregate_train(number, grid.send_and_receive(messages, timeout=timeout))
                    break
                except TooFewReplies:
                    if not self._try_again():
                        raise
            if self._is_last:
                self._measure_elsewhere(grid)
            messages = self.configure_evaluate(number, arrays, config, grid)
            self.aggregate_evaluate(number, grid.send_and_receive(messages, timeout=timeout))

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send every participant what the method has for it."""
        self._meet_new_nodes(grid)
        chosen = self.participants(server_round, self.now.attempt)
        if self.ledger:
            chosen = self.ledger.ask(chosen)
            # A run that ends in mid-round must not forget what it has asked for
            self.folder.save_state(self.state)
        self.state.lent = {}
        self.now.sent = self.method.send(self.state, chosen, train=True)
        self.now.record.bytes_down |= {i: num_bytes(t) for i, t in self.now.sent.items()}
        return self._messages(MessageType.TRAIN, self.now.sent)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Merge the round's uploads in client order; failed clients are named and left out.

        Raises TooFewReplies where fewer than server.min-replies are good.
        """
        record, now = self.now.record, self.now
        trained: dict[int, Trained] = {}
        for client_id, content in now.replies.sort(replies):
            expected = self.method.expected(self.state, now.sent[client_id])
            most = self.cards[client_id].sizes["train"]
            try:
                trained[client_id] = check_upload(content, client_id, expected, most)
            except Exception as error:  # one client's answer must never end everybody's run
                now.replies.refuse(client_id, error)
        # Whose update counts must not depend on another's data
        max_step = 0.0 if self.privacy.at_server else self.settings.server.max_step
        for client_id, why in too_far(trained, now.sent, max_step).items():
            now.replies.refuse(client_id, Refused(why))
            del trained[client_id]
        self._report_failures("train", trained)
        if len(trained) < self.settings.server.min_replies:
            first = next(iter(now.replies.failures().values()), "nobody was asked")
            raise TooFewReplies(
                f"round {record.round}: {len(trained)} of {len(now.sent)} clients answered as they "
                f"should (server.min-replies={self.settings.server.min_replies}); {first}"
            )
        for client_id, answer in trained.items():
            answer.enter(record, client_id)
            self.trained[client_id] = record.round
            if client_id in self.state.lent:
                record.lent[client_id] = self.state.lent[client_id]
        self.state.metrics = {}
        uploads = {i: answer.upload for i, answer in trained.items()}
        if self.privacy.at_server:
            uploads = in_place_of_each(self.settings, now.sent, uploads, record.round)
        self.method.merge(self.state, uploads)
        self.state.round = record.round
        record.metrics = dict(self.state.metrics)
        if self.ledger and (epsilon := self.ledger.epsilon()) is not None:
            record.metrics["epsilon"] = epsilon
        record.train_loss = _mean_loss(trained)
        return None, None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Evaluate all clients after every n-th round and after the last one."""
        due = self.now.record.round % self.settings.eval_every == 0
        return self._evaluation_messages() if due or self._is_last else self._messages("", {})

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Write the round down: rounds.jsonl first, then the checkpoint that makes it count."""
        record = self.now.record
        record.clients |= self._evaluated(replies, scored=self._scores_are_due())
        if record.round == 0:
            if not record.clients:
                raise TooFewReplies(next(iter(self.now.replies.failures().values())))
            sanity.check(self.settings.eval, record.clients, self.cards)
        record.seconds = time.monotonic() - self.now.started
        self.folder.append_round(record)
        self.rounds.append(record)
        self.folder.save_state(self.state)
        self._keep_best()
        fields = record.fields()
        logger.info("%s", record.line(self.settings.num_server_rounds), extra={"fields": fields})
        for each in self.told:
            each.tell(record)
        return None

    def summary(self) -> None:
        """Say what is about to run."""
        logger.info("%s over %d clients", self.settings.method, len(self.cards))

    def participants(self, server_round: int, attempt: int = 0) -> list[int]:
        """Return who trains in a round, a function of (seed, round), the same for all methods.

        Clients without training images cannot be drawn. Another attempt is another draw.
        """
        able = [i for i in self._asked() if self.cards[i].can_train]
        count = max(1, round(self.settings.fraction_train * len(able)))
        again = (attempt,) * (attempt > 0)
        rng = numpy_generator(self.settings.seed, "participants", server_round, *again)
        return sorted(rng.choice(able, size=count, replace=False).tolist()) if able else []

    def _asked(self) -> list[int]:
        """Return the clients that are asked: who was refused too often in a row rests.

        New clients are asked at the end alone.
        """
        limit, trains = self.settings.server.max_refusals, self.settings.data.trains
        return [i for i in sorted(self.cards) if self.refusals[i] < limit and trains(i)]

    def _measure_elsewhere(self, grid: Grid) -> None:
        """Measure the common model on other data sets, and on new clients before and after."""
        record, asked = self.now.record, self._asked()
        for other in self.others:
            try:
                sent = self.method.send(self.state, asked, train=False)
                record.on[other.name] = other.measure(sent, record.round)
            except Exception as error:  # of images that nobody trains on: the run is not lost
                logger.error("no accuracy on %s: %s", other.name, error)
        new = [i for i in sorted(self.cards) if not self.settings.data.trains(i)]
        for train, more in ((False, "zeroshot"), (True, "adapt")) if new else ():
            sent = self.method.send(self.state, new, train=train)
            messages = self._messages(MessageType.EVALUATE, sent, {more: True})
            replies = grid.send_and_receive(messages, timeout=self.settings.node_timeout)
            for client_id, measured in self._evaluated(replies).items():
                record.new_clients.setdefault(client_id, {}).update(measured)

    def _evaluated(
        self, replies: Iterable[Message], scored: bool = False
    ) -> dict[int, dict[str, float]]:
        """Return the accuracies of the clients whose answers are good, and report the others.

        scored: scores were asked for too; those of good answers go into the round's record.
        """
        good: dict[int, dict[str, float]] = {}
        for client_id, content in self.now.replies.sort(replies):
            try:
                measured = check_evaluation(content, client_id, ACCURACIES)
                if scored:
                    card, asked = self.cards[client_id], self.settings.eval
                    classes, images = len(card.task.classnames), card.sizes["test"]
                    self.now.record.scores[client_id] = check_scores(
                        content, asked, classes, images
                    )
                good[client_id] = measured
            except Exception as error:
                self.now.replies.refuse(client_id, error)
        self._report_failures("evaluate", good)
        return good

    def _try_again(self) -> bool:
        """Count an attempt; tell whether another one may go otherwise.

        It may where other clients can be drawn, or some did not answer at all.
        """
        before, silent = set(self.now.sent), self.now.replies.silent()
        self.now.attempt += 1
        others = set(self.participants(self.now.record.round, self.now.attempt)) - before
        left = self.now.attempt < self.settings.server.attempts
        if left and (others or silent):
            logger.warning("round %d is tried again", self.now.record.round)
            return True
        return False

    def _evaluation_messages(self) -> list[Message]:
        sent = self.method.send(self.state, self._asked(), train=False)
        # CLIP without any training is the same in every round
        more = {"zeroshot": self.now.record.round == 0, "scores": self._scores_are_due()}
        return self._messages(MessageType.EVALUATE, sent, more)

    def _keep_best(self) -> None:
        """Keep the state of the best validated round, if it is this one; clients hear of it."""
        best = self._find_best()
        if best and best.round == self.now.record.round:
            self.folder.save_best(self.state)

    def _find_best(self) -> Round | None:
        best = best_round(self.rounds) if self.settings.eval.keep_best else None
        if best:
            self.best = best.round
        return best

    @property
    def _is_last(self) -> bool:
        return self.now.record.round == self.settings.num_server_rounds

    def _scores_are_due(self) -> bool:
        return self._is_last and bool(self.settings.eval.names)

    def _messages(
        self,
        kind: str,
        sent: Mapping[int, Mapping[str, Tensor]],
        more: Mapping[str, bool] | None = None,
    ) -> list[Message]:
        server_round = self.now.record.round
        made = {}
        for client_id, tensors in sent.items():
            said = {
                "run": self.folder.run_id,
                "round": server_round,
                "trained": self.trained.get(client_id, 0),
            }
            if self.best:
                said["best"] = self.best
            config = ConfigRecord({**said, **(more or {})})
            content = RecordDict({"arrays": to_arrays(tensors), "config": config})
            node_id = self.cards[client_id].node_id
            made[client_id] = Message(content, node_id, kind, group_id=str(server_round))
        self.now.replies = Replies(made)
        return list(made.values())

    def _meet_new_nodes(self, grid: Grid) -> None:
        """A restarted node may come back under another node id: ask it who it is.

        Whoever is no client of this run is left out and not asked again.
        """
        connected = set(grid.get_node_ids())
        known = {card.node_id for card in self.cards.values()}
        new = sorted(connected - known - self.left_out.keys() - self._late.keys())
        if new:
            clients, timeout = self.settings.data.num_clients, self.settings.node_timeout
            cards, refused = introduce(grid, new, self.folder.run_id, clients, timeout)
            self.left_out |= refused
            self._late |= {card.node_id: card for card in cards}
        for node_id, card in sorted(self._late.items()):
            if reason := late_card(card, self.cards, connected):
                # Its old node may be gone by the next round
                say_left_out(node_id, reason)
                continue
            self.cards[card.client_id] = self._late.pop(node_id)
            self.refusals[card.client_id] = 0
        for node_id in new:
            if node_id in self.left_out:
                say_left_out(node_id, self.left_out[node_id])

    def _report_failures(self, work: str, good: Collection[int]) -> None:
        failed, replies = self.now.record.failed, self.now.replies
        for client_id, reason in replies.failures().items():
            said = f"{work}: {reason}"
            failed[client_id] = f"{failed[client_id]}; {said}" if client_id in failed else said
            fields = {"client": client_id, "work": work, "reason": reason}
            logger.error("client %d failed to %s: %s", *fields.values(), extra={"fields": fields})
        for cause, count in replies.causes().items():
            self.now.record.causes[cause] = self.now.record.causes.get(cause, 0) + count
        for client_id in good:
            self.refusals[client_id] = 0
        for client_id in replies.refused:
            self.refusals[client_id] += 1
            if self.refusals[client_id] == self.settings.server.max_refusals:
                logger.warning(
                    "client %d was refused %d times in a row (server.max-refusals) and is not "
                    "asked again until its node comes anew or the run is resumed",
                    client_id,
                    self.refusals[client_id],
                )


def _mean_loss(trained: Mapping[int, Trained]) -> float | None:
    """Return the mean weighted by n_k over the clients that trained anything."""
    weighted = [
        (answer.loss * answer.upload.num_examples, answer.upload.num_examples)
        for answer in trained.values()
        if answer.loss is not None
    ]
    return sum(loss for loss, _ in weighted) / sum(n for _, n in weighted) if weighted else None
