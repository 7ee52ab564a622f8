"""One round of a run, as a line of rounds.jsonl."""

import json
from dataclasses import asdict, dataclass, field
from statistics import fmean


@dataclass
class Round:
    """What happened in a round; by client id where it is of clients.

    bytes_down, bytes_up: of training; evaluation only measures. failed: reasons.
    clients: accuracies. metrics, client_metrics: a method's own, of the server and of clients.
    """

    round: int
    seconds: float = 0.0
    train_loss: float | None = None
    bytes_down: dict[int, int] = field(default_factory=dict)
    bytes_up: dict[int, int] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    clients: dict[int, dict[str, float]] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    client_metrics: dict[int, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def from_json(cls, line: str) -> "Round":
        """Read a line back; JSON has turned client ids into texts."""
        said = json.loads(line)
        for name in ("bytes_down", "bytes_up", "failed", "clients", "client_metrics"):
            said[name] = {int(client_id): value for client_id, value in said[name].items()}
        return cls(**said)

    def to_json(self) -> str:
        """Return the line, without its end."""
        return json.dumps(asdict(self))

    def mean(self, metric: str) -> float | None:
        """Return the unweighted mean over clients (the paper's metric), or None without one."""
        values = [m[metric] for m in self.clients.values() if metric in m]
        return fmean(values) if values else None

    def worst(self, metric: str) -> float | None:
        """Return the lowest value of all clients that have one, or None without one."""
        return min((m[metric] for m in self.clients.values() if metric in m), default=None)

    def line(self, rounds: int) -> str:
        """Return a short progress line."""
        parts = [f"round {self.round}/{rounds}"]
        if self.train_loss is not None:
            parts.append(f"loss {self.train_loss:.3f}")
        for name in ("personal", "global"):
            if (value := self.mean(f"{name}-accuracy")) is not None:
                parts.append(f"{name} {value:.1%}")
        if self.failed:
            parts.append(f"{len(self.failed)} failed")
        return "  ".join([*parts, f"{self.seconds:.1f} s"])
