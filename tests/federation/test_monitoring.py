"""What an operator sees of a run: lines that machines read, Prometheus' numbers, a health line."""

import json
import logging
import os
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pfedmoap_flwr import logs
from pfedmoap_flwr.cli.main import main
from pfedmoap_flwr.engines.simulation import free_port
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.federation.exporter import Prometheus, exporter
from pfedmoap_flwr.runs.folder import RunFolder
from pfedmoap_flwr.runs.health import health
from pfedmoap_flwr.runs.record import Round
from support.federation import Federate

ROUND = Round(
    round=3,
    seconds=2.5,
    train_loss=1.25,
    bytes_up={0: 512, 2: 512},
    failed={1: "train: refused: ctx is not finite"},
    causes={"refused": 1},
    clients={0: {"personal-accuracy": 0.5}, 2: {"personal-accuracy": 1.0}},
)


@pytest.fixture(autouse=True)
def text_again() -> Iterator[None]:
    """Other tests read log lines as they are by default."""
    yield
    logs.set_up("text")


# Lines


def test_each_round_is_one_json_line_with_its_numbers(
    federate: Federate, capfd: pytest.CaptureFixture[str]
) -> None:
    run = federate(log_format="json")
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    found = [line for line in lines if "round" in line]
    assert [line["round"] for line in found] == [0, 1, 2]
    for line, record in zip(found, run.rounds(), strict=True):
        assert line["level"] == "info"
        assert line["train_loss"] == record.train_loss
        assert line["personal_accuracy"] == record.mean("personal-accuracy")
        assert line["causes"] == {}


def test_a_forged_message_stays_one_line() -> None:
    record = logging.LogRecord("x", logging.ERROR, "", 0, 'a\n{"round": 9}', None, None)
    line = logs.JsonLines().format(record)
    assert len(line.splitlines()) == 1
    assert json.loads(line)["message"] == 'a\n{"round": 9}'


def test_a_round_s_line_counts_failures_by_cause() -> None:
    assert "1 failed (1 refused)" in ROUND.line(10)
    assert "failed" not in Round(1).line(10)


# Prometheus


def scraped(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        sample.name + "".join(sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_prometheus_reads_the_numbers_of_the_last_round() -> None:
    port = free_port()
    told = exporter(port, 10)
    try:
        told.tell(Round(2, causes={"refused": 1, "no reply": 2}))
        told.tell(ROUND)
        found = scraped(port)
    finally:
        told.close()
    assert found["pfedmoap_round"] == 3
    assert found["pfedmoap_planned_rounds"] == 10
    assert found["pfedmoap_round_seconds"] == 2.5
    assert found["pfedmoap_trained_clients"] == found["pfedmoap_measured_clients"] == 2
    assert found["pfedmoap_train_loss"] == 1.25
    assert found["pfedmoap_personal_accuracy"] == 0.75
    assert found["pfedmoap_failures_totalrefused"] == 2
    assert found["pfedmoap_failures_totalno reply"] == 2
    assert abs(found["pfedmoap_round_end_timestamp_seconds"] - time.time()) < 60


def test_a_run_exports_while_it_works_and_frees_the_port(
    federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, seen = free_port(), []
    append = RunFolder.append_round

    def watched(folder: RunFolder, record: Round) -> None:
        seen.append(scraped(port)["pfedmoap_round"])
        append(folder, record)

    monkeypatch.setattr(RunFolder, "append_round", watched)
    federate(flat={"server.metrics-port": port})
    assert seen == [0, 0, 1]
    Prometheus(port, 1).close()


def test_a_taken_port_is_one_line() -> None:
    port = free_port()
    first = Prometheus(port, 1)
    try:
        with pytest.raises(UsageError, match=f"server.metrics-port={port}: Address already in use"):
            Prometheus(port, 1)
    finally:
        first.close()


# Health


@pytest.fixture
def stopped(reference: Callable[..., RunFolder], tmp_path: Path) -> Path:
    """The folder of a run that wrote its rounds and no ending."""
    done, folder = reference(), tmp_path / "run"
    folder.mkdir()
    for name in ("settings.json", "rounds.jsonl"):
        (folder / name).write_bytes((done.path / name).read_bytes())
    return folder


def aged(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path / "rounds.jsonl", (then, then))


def test_a_run_is_late_when_a_round_takes_far_longer_than_usual(stopped: Path) -> None:
    aged(stopped, 30)
    assert health(stopped).line() == "OK  round 2/2, 30 s ago"
    aged(stopped, 90)
    assert health(stopped).line() == "LATE  round 2/2, 90 s ago, more than 60 s"
    assert health(stopped, max_age=100).is_good


def test_an_ended_run_is_done_or_failed_however_old(
    stopped: Path, reference: Callable[..., Any]
) -> None:
    aged(stopped, 10**6)
    assert health(reference().path).line() == "DONE  round 2/2"
    (stopped / "error.txt").write_text("Traceback\nclient 0 is gone\n")
    assert health(stopped).line() == "FAILED  round 2/2: client 0 is gone"


def test_the_command_has_an_exit_code_for_an_alarm(
    stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    aged(stopped, 0)
    assert main(["health", str(stopped)]) == 0
    aged(stopped, 1000)
    assert main(["health", str(stopped), "--max-age", "500"]) == 1
    assert capsys.readouterr().out.splitlines()[1].startswith("LATE  round 2/2, 1000 s ago")
    assert main(["health", str(stopped.parent)]) == 2
