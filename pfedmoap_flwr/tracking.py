"""A run's numbers in TensorBoard, Trackio, MLflow or Weights & Biases.

Means over clients and the settings without paths go there; nothing of a single client does.
"""

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pfedmoap_flwr.config import Settings, known_fields
from pfedmoap_flwr.errors import RunFailed, UsageError, last_line, reason_of
from pfedmoap_flwr.runs.folder import PLACES, RunFolder, load_settings
from pfedmoap_flwr.runs.open_classes import new_accuracies, open_accuracies, other_accuracies
from pfedmoap_flwr.runs.record import Round
from pfedmoap_flwr.settings import Value, is_path

PROJECT = "pfedmoap"
"""What the runs lie under in a tracker that has projects or experiments."""
ID = "pfedmoap.run"

logger = logging.getLogger("flwr.pfedmoap")


@dataclass(frozen=True)
class Tracked:
    """A run as trackers know it. first: the round from which it is told, 0 for a new one."""

    folder: Path
    run_id: str
    settings: Mapping[str, Value]
    first: int = 0

    @classmethod
    def of(cls, folder: RunFolder, settings: Settings, first: int = 0) -> "Tracked":
        """Return a run's name, id and those of its settings that name no place."""
        flat = settings.flat()
        fields = known_fields([key.partition(".")[0] for key in settings.tables])
        shown = {k: v for k, v in flat.items() if k not in PLACES and not is_path(fields[k])}
        shown["eval.on"] = ",".join(settings.eval.others())
        return cls(folder.path, folder.run_id, shown, first)


class Backend(Protocol):
    """A tracker's own way to take numbers."""

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Take the numbers of a round."""

    def finish(self) -> None:
        """Write what is still in memory."""


class _TensorBoard:
    def __init__(self, run: Tracked) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What an earlier start wrote of rounds that are run again is dropped
        self.writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.first)
        rows = "\n".join(f"| {key} | {value} |" for key, value in run.settings.items())
        self.writer.add_text("settings", f"| setting | value |\n|---|---|\n{rows}")

    def log(self, numbers: dict[str, float], step: int) -> None:
        for name, number in numbers.items():
            self.writer.add_scalar(name, number, step)
        self.writer.flush()

    def finish(self) -> None:
        self.writer.close()


class _MLflow:
    """A client of its own: the process may have another active run."""

    def __init__(self, run: Tracked) -> None:
        from mlflow import MlflowClient

        self.client = MlflowClient()
        known = self.client.get_experiment_by_name(PROJECT)
        experiment = known.experiment_id if known else self.client.create_experiment(PROJECT)
        found = self.client.search_runs([experiment], f"tags.`{ID}` = '{run.run_id}'")
        if found:
            self.id = found[0].info.run_id
            return
        made = self.client.create_run(experiment, run_name=run.folder.name, tags={ID: run.run_id})
        self.id = made.info.run_id
        for key, value in run.settings.items():
            self.client.log_param(self.id, key, value)

    def log(self, numbers: dict[str, float], step: int) -> None:
        for name, number in numbers.items():
            self.client.log_metric(self.id, name, number, step=step)

    def finish(self) -> None:
        self.client.set_terminated(self.id)


def _trackio(run: Tracked) -> Any:
    import trackio

    name = f"{run.folder.name}-{run.run_id[:8]}"
    return trackio.init(project=PROJECT, name=name, config=dict(run.settings), resume="allow")


def _wandb(run: Tracked) -> Any:
    import wandb

    return wandb.init(
        project=PROJECT,
        id=run.run_id,
        name=run.folder.name,
        config=dict(run.settings),
        resume="allow",
        dir=str(run.folder),
    )


BACKENDS: dict[str, Callable[[Tracked], Backend]] = {
    "tensorboard": _TensorBoard,
    "trackio": _trackio,
    "mlflow": _MLflow,
    "wandb": _wandb,
}


class Tracker:
    """Told of each round. What breaks in it ends the tracking, with one warning, and not the run.

    Raises UsageError where the tracker's package is not installed.
    """

    def __init__(self, name: str, run: Tracked) -> None:
        self.name = name
        self._backend: Backend | None = None
        if name != "none":
            self._trying(lambda: setattr(self, "_backend", _open(name, run)))

    def tell(self, record: Round) -> None:
        """Take the numbers of a finished round."""
        if backend := self._backend:
            self._trying(lambda: backend.log(numbers(record), record.round))

    def close(self) -> None:
        """End the tracking."""
        if self._backend:
            self._trying(self._backend.finish)
            self._backend = None

    def _trying(self, work: Callable[[], object]) -> None:
        try:
            work()
        except UsageError:
            raise
        except Exception as error:  # a tracker that is down must not end a run
            self._backend = None
            reason = reason_of(error)
            logger.warning("tracker=%s is off from here on: %s", self.name, reason)


def send(folder: str | os.PathLike[str], name: str) -> None:
    """Tell a tracker all rounds of a run that is over, or as far as it is.

    Raises:
        UsageError: the folder is no run's, there is no such tracker, or its package is missing.
        RunFailed: the tracker does not take them.
    """
    if name not in BACKENDS:
        raise UsageError(f"there is no tracker {name!r}; there are {', '.join(BACKENDS)}")
    run = RunFolder(Path(folder))
    tracked, rounds = Tracked.of(run, load_settings(run.path)), run.rounds()
    try:
        backend = _open(name, tracked)
        for record in rounds:
            backend.log(numbers(record), record.round)
        backend.finish()
    except UsageError:
        raise
    except Exception as error:
        raise RunFailed(f"{name}: {reason_of(error)}") from error


def numbers(record: Round) -> dict[str, float]:
    """Return a round's numbers over all clients, by name."""
    found: dict[str, float | None] = {
        "train_loss": record.train_loss,
        "worst_client_accuracy": record.worst("personal-accuracy"),
        "seconds": record.seconds,
        "bytes_down": sum(record.bytes_down.values()),
        "bytes_up": sum(record.bytes_up.values()),
        "peak_memory": max(record.memory.values(), default=None),
        "failures": len(record.failed),
    }
    for model in ("personal", "global", "zeroshot"):
        for split in ("", "validation-"):
            name = f"{model}-{split}accuracy"
            found[name.replace("-", "_")] = record.mean(name)
    found |= {f"method/{name}": value for name, value in record.metrics.items()}
    found |= open_accuracies(record, record) | new_accuracies(record) | other_accuracies(record)
    return {name: value for name, value in found.items() if value is not None}


def _open(name: str, run: Tracked) -> Backend:
    try:
        return BACKENDS[name](run)
    except ImportError as error:
        raise UsageError(
            f"tracker {name} needs a package that is not installed ({last_line(error)}); install "
            f"pfedmoap-flwr[{name}]"
        ) from None
