"""One round of a run, as a line of rounds.jsonl."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

BY_CLIENT = {
    "bytes_down",
    "bytes_up",
    "memory",
    "failed",
    "clients",
    "client_metrics",
    "new_clients",
    "lent",
    "scores",
}


@dataclass
class Round:
    """What happened in a round; by client id where it is of clients.

    bytes_down, bytes_up: of training; evaluation only measures. memory: the most bytes that a
    client's process has held. failed: reasons. causes: how many
    answers did not count, by cause. clients: accuracies. metrics, client_metrics: a method's own,
    of the server and of clients. scores: by model and name, where a run asks for any. new_clients:
    accuracies of those that never train. on: of other data sets, by name and model. lent: whose
    prompts each client trained with, as ids.
    """

    round: int
    seconds: float = 0.0
    train_loss: float | None = None
    bytes_down: dict[int, int] = field(default_factory=dict)
    bytes_up: dict[int, int] = field(default_factory=dict)
    memory: dict[int, int] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    causes: dict[str, int] = field(default_factory=dict)
    clients: dict[int, dict[str, float]] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    client_metrics: dict[int, dict[str, float]] = field(default_factory=dict)
    scores: dict[int, dict[str, dict[str, Any]]] = field(default_factory=dict)
    new_clients: dict[int, dict[str, float]] = field(default_factory=dict)
    on: dict[str, dict[str, float]] = field(default_factory=dict)
    lent: dict[int, list[int]] = field(default_factory=dict)

    @classmethod
    def from_json(cls, line: str | bytes) -> "Round":
        """Read a line back; JSON has turned client ids into texts."""
        said = json.loads(line)
        for name in BY_CLIENT & said.keys():
            said[name] = {int(client_id): value for client_id, value in said[name].items()}
        return cls(**said)

    def to_json(self) -> str:
        """Return the line, without its end; scores stand in it where there are any."""
        said = asdict(self)
        if not self.scores:
            del said["scores"]
        return json.dumps(said)

    def mean(self, metric: str) -> float | None:
        """Return the unweighted mean over clients (the paper's metric), or None without one."""
        return mean_of(self.clients, metric)

    def worst(self, metric: str) -> float | None:
        """Return the lowest value of all clients that have one, or None without one."""
        return min((m[metric] for m in self.clients.values() if metric in m), default=None)

    def fields(self) -> dict[str, float | int | dict[str, int] | None]:
        """Return the round's numbers over all clients, for logs that machines read."""
        return {
            "round": self.round,
            "seconds": self.seconds,
            "train_loss": self.train_loss,
            "trained": len(self.bytes_up),
            "measured": len(self.clients),
            "causes": self.causes,
            "personal_accuracy": self.mean("personal-accuracy"),
            "global_accuracy": self.mean("global-accuracy"),
        }

    def line(self, rounds: int) -> str:
        """Return a short progress line."""
        parts = [f"round {self.round}/{rounds}"]
        if self.train_loss is not None:
            parts.append(f"loss {self.train_loss:.3f}")
        for name in ("personal", "global"):
            if (value := self.mean(f"{name}-accuracy")) is not None:
                parts.append(f"{name} {value:.1%}")
        if "epsilon" in self.metrics:
            parts.append(f"epsilon {self.metrics['epsilon']:.3g}")
        if self.failed:
            causes = ", ".join(f"{count} {cause}" for cause, count in self.causes.items())
            parts.append(f"{len(self.failed)} failed ({causes})")
        return "  ".join([*parts, f"{self.seconds:.1f} s"])


def last_measured(rounds: Sequence[Round]) -> Round:
    """Return the last round in which clients were measured. Raises StopIteration without one."""
    return next(record for record in reversed(rounds) if record.clients)


def mean_of(clients: Mapping[int, Mapping[str, float]], metric: str) -> float | None:
    """Return the unweighted mean over the clients that have a metric, or None without one."""
    values = [measured[metric] for measured in clients.values() if metric in measured]
    return fmean(values) if values else None
