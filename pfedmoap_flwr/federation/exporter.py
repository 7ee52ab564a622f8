"""What an operator's Prometheus reads of a run, on a port of the server's own machine."""

import time
from typing import Protocol

from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.runs.record import Round

HOST = "127.0.0.1"


class Exporter(Protocol):
    """Told of each round; closed when the run ends."""

    def tell(self, record: Round) -> None:
        """Take the numbers of a finished round."""

    def close(self) -> None:
        """End what was started."""


class Silent:
    """Exports nothing."""

    def tell(self, record: Round) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class Prometheus:
    """Serves http://127.0.0.1:PORT/metrics, by prometheus_client.

    Raises UsageError where the extra is not installed or the port is taken.
    """

    def __init__(self, port: int, rounds: int) -> None:
        try:
            from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server
        except ImportError:
            raise UsageError(
                f"setting server.metrics-port={port} needs prometheus-client; install "
                "pfedmoap-flwr[prometheus]"
            ) from None
        registry = CollectorRegistry()

        def gauge(name: str, what: str) -> Gauge:
            return Gauge(f"pfedmoap_{name}", what, registry=registry)

        gauge("planned_rounds", "rounds that the run is asked for").set(rounds)
        self._round = gauge("round", "last round that was written down")
        self._ended = gauge("round_end_timestamp_seconds", "when that was, Unix time")
        self._seconds = gauge("round_seconds", "how long it took")
        self._trained = gauge("trained_clients", "clients whose uploads were merged in it")
        self._measured = gauge("measured_clients", "clients that were measured after it")
        self._loss = gauge("train_loss", "mean training loss")
        self._personal = gauge("personal_accuracy", "mean over clients, 0 to 1")
        self._failures = Counter(
            "pfedmoap_failures", "answers that did not count", ["cause"], registry=registry
        )
        try:
            self._server, self._thread = start_http_server(port, HOST, registry)
        except OSError as error:
            raise UsageError(f"setting server.metrics-port={port}: {error.strerror}") from error

    def tell(self, record: Round) -> None:
        """Take the numbers of a finished round."""
        self._round.set(record.round)
        self._ended.set(time.time())
        self._seconds.set(record.seconds)
        self._trained.set(len(record.bytes_up))
        self._measured.set(len(record.clients))
        if record.train_loss is not None:
            self._loss.set(record.train_loss)
        if (personal := record.mean("personal-accuracy")) is not None:
            self._personal.set(personal)
        for cause, count in record.causes.items():
            self._failures.labels(cause).inc(count)

    def close(self) -> None:
        """Free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def exporter(port: int, rounds: int) -> Exporter:
    """Return what exports a run's numbers on this port; 0: nothing does."""
    return Prometheus(port, rounds) if port else Silent()
