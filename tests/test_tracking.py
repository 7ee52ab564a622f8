"""A run's numbers in trackers: they are those of rounds.jsonl, and a broken one ends no run."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pfedmoap_flwr import tracking
from pfedmoap_flwr.errors import RunFailed, UsageError
from pfedmoap_flwr.runs.folder import RunFolder
from support.federation import Federate, assert_same


def scalars(run: RunFolder, name: str) -> dict[int, float]:
    """What TensorBoard's own reader finds, by step."""
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def means(run: RunFolder, name: str) -> dict[int, Any]:
    """The same from rounds.jsonl."""
    return {r.round: pytest.approx(r.mean(name), rel=1e-6) for r in run.rounds() if r.mean(name)}


class StandIn:
    """A tracker's module and its run, which write down what they are told."""

    def __init__(self) -> None:
        self.begun: dict[str, Any] = {}
        self.logged: dict[int, dict[str, float]] = {}
        self.ended = False

    def init(self, **options: Any) -> "StandIn":
        self.begun = options
        return self

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.logged[step] = numbers

    def finish(self) -> None:
        self.ended = True


def test_tensorboard_reads_what_the_rounds_say(federate: Federate) -> None:
    run = federate(method="promptfl", tracker="tensorboard")
    assert scalars(run, "personal_accuracy") == means(run, "personal-accuracy")
    assert scalars(run, "zeroshot_accuracy").keys() == {0}
    assert scalars(run, "train_loss") == {
        r.round: pytest.approx(r.train_loss, rel=1e-6) for r in run.rounds() if r.round
    }
    assert_same(run, federate("without", method="promptfl"))


def test_a_resumed_run_goes_on_in_its_events(federate: Federate) -> None:
    first = federate(method="promptfl", tracker="tensorboard", num_server_rounds=1)
    flat = {"resume": str(first.path), "run-dir": ""}
    run = federate(method="promptfl", tracker="tensorboard", num_server_rounds=3, flat=flat)
    assert scalars(run, "personal_accuracy").keys() == {0, 1, 2, 3}
    assert scalars(run, "personal_accuracy") == means(run, "personal-accuracy")


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_numbers_and_settings_go_to_a_tracker(
    federate: Federate, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    there = StandIn()
    monkeypatch.setitem(sys.modules, name, there)
    run = federate(method="promptfl", tracker=name, flat={"eval.on": "emoji-domains"})
    assert there.ended
    assert there.logged.keys() == {0, 1, 2}
    last = run.rounds()[-1]
    assert there.logged[2]["personal_accuracy"] == last.mean("personal-accuracy")
    assert there.logged[2]["bytes_up"] == sum(last.bytes_up.values())
    assert there.logged[2]["on_emoji-domains_global_accuracy"] == last.on["emoji-domains"]["global"]
    assert there.begun["project"] == "pfedmoap"
    assert there.begun["resume"] == "allow"
    config = there.begun["config"]
    assert config["method"] == "promptfl"
    assert str(run.path) not in str(config)


def test_mlflow_has_one_run_of_a_run(
    federate: Federate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    run = federate(method="promptfl", tracker="mlflow")
    tracking.send(run.path, "mlflow")
    client = mlflow.MlflowClient()
    (experiment,) = client.search_experiments(filter_string="name = 'pfedmoap'")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.data.params["method"] == "promptfl"
    history = client.get_metric_history(found.info.run_id, "personal_accuracy")
    assert {m.step: m.value for m in history} == means(run, "personal-accuracy")


@pytest.mark.parametrize("breaks", ["init", "log", "finish"])
def test_a_broken_tracker_is_one_warning_and_no_end(
    federate: Federate,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    breaks: str,
) -> None:
    there = StandIn()

    def broken(*_: Any, **__: Any) -> None:
        raise ConnectionError("nobody is there")

    monkeypatch.setattr(there, breaks, broken)
    monkeypatch.setitem(sys.modules, "wandb", there)
    run = federate(method="coop", tracker="wandb")
    assert caplog.text.count("tracker=wandb is off from here on: nobody is there") == 1
    assert len(run.rounds()) == 3
    with pytest.raises(RunFailed, match="wandb: nobody is there"):
        tracking.send(run.path, "wandb")


def test_a_tracker_that_is_not_installed_names_its_extra(
    federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match=r"install pfedmoap-flwr\[wandb\]"):
        federate(method="coop", tracker="wandb")


def test_an_earlier_run_is_sent(federate: Federate) -> None:
    run = federate(method="coop")
    tracking.send(str(run.path), "tensorboard")
    assert scalars(run, "personal_accuracy") == means(run, "personal-accuracy")
    with pytest.raises(UsageError, match="there are tensorboard, trackio, mlflow, wandb"):
        tracking.send(run.path, "paper")
    with pytest.raises(UsageError, match=r"no settings\.json there"):
        tracking.send(run.path / "clients", "tensorboard")


def test_no_place_of_this_machine_goes_to_a_tracker(federate: Federate) -> None:
    run = federate(method="coop")
    settings: Any = SimpleNamespace(
        flat=lambda: {"data.path": "/secret", "run-dir": "/secret", "lr": 0.1},
        tables={},
        eval=SimpleNamespace(others=lambda: {"folder": "/secret"}),
    )
    assert tracking.Tracked.of(run, settings).settings == {"lr": 0.1, "eval.on": "folder"}
