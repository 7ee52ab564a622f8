"""Scores in a federation: measured at the client, read strictly, written beside clients.csv."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import MetricRecord, RecordDict
from PIL import Image

from pfedmoap_flwr import api, config
from pfedmoap_flwr.cli import main as cli
from pfedmoap_flwr.config import METRICS, EvalSettings
from pfedmoap_flwr.engines.in_process import make_context
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.federation.scores import check_scores, own_min_count
from pfedmoap_flwr.federation.strict import Refused
from pfedmoap_flwr.runs import checkpoint
from pfedmoap_flwr.runs.choice import best_round, chosen
from pfedmoap_flwr.runs.find_model import find_model
from pfedmoap_flwr.runs.folder import RunFolder
from pfedmoap_flwr.runs.heads import KeptHeads
from support.federation import Exchange, Federate, assert_same, content
from support.tiny import CLASSNAMES, NUM_CLIENTS, TINY

ASKED = {"eval.metrics": ",".join(METRICS), "eval.min-count": 0, "eval.bootstrap": 20}


def test_scores_are_of_the_last_round_and_of_each_client(
    federate: Federate, wire: list[Exchange]
) -> None:
    run = federate(flat=ASKED)
    said = json.loads((run.path / "scores.json").read_text())
    assert said["classnames"] == CLASSNAMES
    last = run.rounds()[-1]
    assert said["round"] == last.round == 2
    assert last.scores.keys() == set(range(NUM_CLIENTS))
    for client, models in last.scores.items():
        for model in ("personal", "global"):
            found = models[model]
            # The same images and the same head as the accuracy that is measured anyway
            accuracy = last.clients[client][f"{model}-accuracy"]
            assert found["accuracy"] == pytest.approx(accuracy)
            assert sum(found["confusion"]) == run.clients()[client]["test"]
            right = sum(found["confusion"][:: len(CLASSNAMES) + 1])
            assert right / sum(found["confusion"]) == pytest.approx(accuracy)
    with (run.path / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    one = next(r for r in rows if (r["client"], r["model"], r["metric"]) == ("2", "global", "f1"))
    assert float(one["value"]) == last.scores[2]["global"]["f1"]
    assert float(one["low"]) == last.scores[2]["global"]["f1.low"]
    asked = {(e.round, e.kind) for e in wire if "scores" in e.reply.content}
    assert asked == {(2, "evaluate")}


def test_scores_change_nothing_else(federate: Federate, reference: Federate) -> None:
    plain, scored = federate("plain/run"), federate("scored/run", flat=ASKED)
    assert not (plain.path / "scores.json").exists()
    for record in (rounds := scored.rounds()):
        record.scores = {}
        record.seconds, record.memory = 0.0, {}
    others = plain.rounds()
    for record in others:
        record.seconds, record.memory = 0.0, {}
    assert rounds == others


def test_a_nodes_own_least_count_cannot_be_lowered(
    federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pfedmoap_flwr.federation.scores.own_min_count", lambda context: 1000)
    run = federate(flat=ASKED)
    for models in run.rounds()[-1].scores.values():
        for found in models.values():
            assert found.keys() <= {
                "few",
                "withheld",
                *(f"{name}{end}" for name in ("accuracy", "ece") for end in ("", ".low", ".high")),
            }
            assert found["withheld"] == found["few"] > 1


@pytest.mark.parametrize("said", [-1, 1.5, "5", True])
def test_a_least_count_that_is_none_is_refused(said: Any) -> None:
    with pytest.raises(UsageError, match=r"min-count=.*: must be a whole number >= 0"):
        own_min_count(make_context(1, {"min-count": said}, {}))
    assert own_min_count(make_context(1, {"min-count": 7}, {})) == 7


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"personal.f1": 1.5}, "personal.f1 is 1.5, not a number from 0 to 1"),
        ({"personal.f1": float("nan")}, "personal.f1 is nan"),
        ({"personal.withheld": 9}, "personal.withheld is 9"),
        ({"personal.f1.4": 0.5}, r"there is no score 'personal.f1.4'"),
        ({"zeroshot.f1": 0.5}, r"there is no score 'zeroshot.f1'"),
        ({"personal.auroc": 0.5}, r"there is no score 'personal.auroc'"),
        ({"personal.confusion": [1] * 15}, "no list of 16 whole numbers"),
        ({"personal.confusion": [1] * 16}, "counts 16 images, not 20"),
        ({"personal.confusion": [-1, 21, *[0] * 14]}, "is -1, not a whole number"),
        ({"personal.confusion": 0.5}, "no list of 16 whole numbers"),
    ],
)
def test_scores_are_read_strictly(change: dict[str, Any], said: str) -> None:
    good = {"personal.f1": 0.5, "personal.f1.3": 0.5, "global.f1.low": 0.1, "personal.withheld": 0}
    settings = EvalSettings(metrics="f1, accuracy")
    content = RecordDict({"scores": MetricRecord(good)})
    assert check_scores(content, settings, 4, 20)["personal"]["f1.3"] == 0.5
    content = RecordDict({"scores": MetricRecord({**good, **change})})
    with pytest.raises(Refused, match=said):
        check_scores(content, settings, 4, 20)
    with pytest.raises(Refused, match="there is no MetricRecord 'scores'"):
        check_scores(RecordDict({}), settings, 4, 20)


def test_a_metric_that_there_is_not_is_named() -> None:
    with pytest.raises(UsageError, match=r"eval.metrics='f1,auc': 'auc' must be one of .*auroc"):
        config.parse({"eval.metrics": "f1,auc"})


def test_the_end_of_a_run_shows_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    words = [f"{k}={v}" for k, v in {**TINY, **ASKED, "eval.min-count": 4}.items()]
    assert cli.main(["run", *words, f"run-dir={tmp_path / 'run'}", "num-server-rounds=1"]) == 0
    shown = capsys.readouterr().out
    assert "personal, mean" in shown
    assert "sensitivity" in shown
    said = " ".join(shown.split())
    assert "kept back at " in said
    assert " clients, for small counts (eval.min-count): F1 and sensitivity of " in said


# Chosen by validation


def test_validation_images_choose(federate: Federate) -> None:
    run = federate(num_server_rounds=3)
    last, rows, summary = run.rounds()[-1], run.clients(), run.summary()
    accuracies = []
    for row in rows:
        measured = last.clients[row["client"]]
        personal = measured["personal-validation-accuracy"]
        expected = "personal" if personal >= measured["global-validation-accuracy"] else "global"
        assert row["chosen"] == chosen(measured) == expected
        accuracies.append(measured[f"{expected}-accuracy"])
    assert summary["chosen_accuracy"] == pytest.approx(sum(accuracies) / len(accuracies))
    assert summary["chose_personal"] == sum(row["chosen"] == "personal" for row in rows)
    best = max(run.rounds(), key=lambda r: (by_hand(r), -r.round))
    assert summary["best_round"] == best.round


def by_hand(record: Any) -> float:
    each = [
        max(m["personal-validation-accuracy"], m["global-validation-accuracy"])
        for m in record.clients.values()
    ]
    return round(sum(each) / len(each), 12)


SHORT: dict[str, Any] = {"num_server_rounds": 2, "local_epochs": 1}


@pytest.fixture
def best_of_six(federate: Federate, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run of six rounds that takes its second one for the best."""
    module = "pfedmoap_flwr.federation.strategy.best_round"
    monkeypatch.setattr(module, lambda rounds: best_round(rounds[:3]))
    monkeypatch.setattr("pfedmoap_flwr.runs.choice.validated", lambda record: record.round or None)
    return federate("six/run", flat={"eval.keep-best": True}, **{**SHORT, "num_server_rounds": 6})


def test_the_best_round_is_kept_at_server_and_clients(
    best_of_six: RunFolder, federate: Federate
) -> None:
    run, two = best_of_six, federate("two/run", **SHORT)
    assert checkpoint.load(run.best).round == 2
    best = content(run.best / checkpoint.FILE, run)
    assert best == content(two.path / checkpoint.FILE, two)
    for number in range(NUM_CLIENTS):
        (kept,), (then,) = (list(r.path.rglob(f"client-{number}")) for r in (run, two))
        head, other = KeptHeads(kept).load(before=3), KeptHeads(then).load(before=3)
        assert head is not None
        assert other is not None
        assert all((head[name] == other[name]).all() for name in other)
        assert (kept / "round-00002.safetensors").exists()
        assert not (kept / "round-00001.safetensors").exists()
    assert not two.best.exists()


def test_the_best_rounds_models_are_those_of_a_run_that_ends_there(
    best_of_six: RunFolder, federate: Federate, tmp_path: Path
) -> None:
    two = federate("two/run", **SHORT)
    Image.new("RGB", (16, 16), (220, 40, 40)).save(image := tmp_path / "image.png")
    for number in range(NUM_CLIENTS):
        best = api.load(best_of_six.path).client(number, best=True)
        assert best.meaning.round == 2
        said = best.probabilities([image])
        assert (said == find_model(two.path, number).probabilities([image])).all()
        assert (said != find_model(best_of_six.path, number).probabilities([image])).any()
    with pytest.raises(UsageError, match="has no best/"):
        find_model(two.path, 0, best=True)


def test_a_run_with_scores_is_resumed(
    federate: Federate, recorded: Callable[..., Any], tmp_path: Path
) -> None:
    flat = {**ASKED, "eval.keep-best": True}
    whole = federate("whole/run", flat=flat, num_server_rounds=3)
    run = federate("parts/run", flat=flat, num_server_rounds=1)
    api.execute(api.plan({"resume": str(run.path), "num-server-rounds": 3}))
    first = run.rounds()
    # The first part ended with scores of its own
    assert first[1].scores
    text = (run.path / "rounds.jsonl").read_text().splitlines()
    bare = [
        json.dumps({k: v for k, v in json.loads(line).items() if k != "scores"}) for line in text
    ]
    last = text[-1]
    (run.path / "rounds.jsonl").write_text("\n".join([*bare[:-1], last]) + "\n")
    assert_same(run, whole)
