"""The Python API: the commands are thin over it, and its examples run."""

import doctest
import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

import pfedmoap_flwr as pf
from pfedmoap_flwr import api
from pfedmoap_flwr.cli import main as cli
from pfedmoap_flwr.data import federated as federated_module
from pfedmoap_flwr.data.partition import partition
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.runs.folder import RunFolder, load_settings
from support.tiny import CLASSNAMES, NUM_CLIENTS, TINY

SHORT: dict[str, Any] = {**TINY, "num-server-rounds": 1, "local-epochs": 1}


@pytest.fixture(autouse=True)
def _somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_public_names_are_these() -> None:
    assert sorted(pf.__all__) == ["RunResult", "Settings", "__version__", "compare", "load", "run"]
    assert all(getattr(pf, name) for name in pf.__all__)
    with pytest.raises(AttributeError, match="no attribute 'runs_'"):
        pf.runs_  # noqa: B018
    assert (Path(pf.__file__).parent / "py.typed").is_file()


def test_a_wheel_holds_the_package_alone() -> None:
    """Any other Flower app has a server_app.py too: at the top level one would replace another."""
    project = tomllib.loads((Path(pf.__file__).parents[1] / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel.keys() == {"packages", "force-include"}
    assert wheel["packages"] == ["pfedmoap_flwr"]
    assert all(place.startswith("pfedmoap_flwr/") for place in wheel["force-include"].values())


def test_a_run_returns_what_it_left(tmp_path: Path) -> None:
    result = pf.run(method="promptfl", seed=3, **TINY)
    (folder,) = (tmp_path / "runs").iterdir()
    assert result.folder == folder
    assert result.summary == json.loads((folder / "summary.json").read_text())
    assert (result.summary["method"], result.summary["seed"]) == ("promptfl", 3)
    records = RunFolder(folder).rounds()
    assert list(result.rounds.index) == [0, 1, 2]
    assert list(result.clients.index) == list(range(NUM_CLIENTS))
    for client, row in result.clients.iterrows():
        measured = records[-1].clients[client]
        assert row["personal_accuracy"] == measured["personal-accuracy"]
        assert row["domain"] in ("photo", "sketch")
        assert row["bytes_up"] == sum(r.bytes_up.get(client, 0) for r in records)
    for number, row in result.rounds.iterrows():
        record = records[number]
        accuracies = [own["personal-accuracy"] for own in record.clients.values()]
        assert row["personal_accuracy"] == pytest.approx(sum(accuracies) / NUM_CLIENTS)
        assert row["bytes_down"] == sum(record.bytes_down.values())
        assert row["trained"] == (NUM_CLIENTS if number else 0)
    assert result.rounds["zeroshot_accuracy"].notna().tolist() == [True, False, False]
    assert result.rounds["train_loss"].isna().tolist() == [True, False, False]
    again = pf.load(str(folder))
    pd.testing.assert_frame_equal(again.rounds, result.rounds)
    pd.testing.assert_frame_equal(again.clients, result.clients)


def test_what_is_no_run_that_has_ended_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no summary\.json there; give the folder of a run"):
        pf.load(tmp_path)


def test_a_clients_model_predicts_and_shows_whom_it_listens_to(tmp_path: Path) -> None:
    result = pf.run(method="pfedmoap", **TINY, lr=0.5)
    model = result.client(3)
    red, blue = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    red.save(tmp_path / "red.png")
    found = model.predict([tmp_path / "red.png", blue])
    assert list(found.index) == [str(tmp_path / "red.png"), 1]
    assert list(found.columns) == ["predicted", "probability", *(f"p({c})" for c in CLASSNAMES)]
    assert found["probability"].tolist() == found.iloc[:, 2:].max(axis=1).tolist()
    lent = RunFolder(result.folder).rounds()[-1].lent[3]
    attention = model.attention([red, blue])
    assert list(attention.columns) == ["own", *(f"client {i}" for i in lent)]
    assert attention.sum(axis=1).tolist() == pytest.approx([1, 1])
    by_class = model.attention([red, blue], by="class")
    assert list(by_class.index) == CLASSNAMES
    assert by_class.mean().tolist() == pytest.approx(attention.mean().tolist())
    words = model.words(2)
    assert list(words.columns) == ["prompt", "part", "token", "rank", "word", "distance"]
    assert len(words) == 4 * 2
    with pytest.raises(UsageError, match="clients are 0 to 3"):
        result.client(4)
    assert len(model.predict([])) == 0


def test_a_client_without_test_images_has_no_accuracy(tmp_path: Path) -> None:
    table = "client,domain,test,personal_accuracy,zeroshot_accuracy\n0,1,0,,\n1,,4,1.0,0.25\n"
    (tmp_path / "clients.csv").write_text(table)
    first, second = RunFolder(tmp_path).clients()
    accuracies = {"personal_accuracy": None, "zeroshot_accuracy": None}
    assert first == {"client": 0, "domain": "1", "test": 0, **accuracies}
    assert (second["domain"], second["personal_accuracy"]) == ("", 1.0)


@pytest.mark.parametrize(
    ("domain", "written"),
    [
        ("=1+1", "'=1+1"),
        ("+1", "'+1"),
        ("-2+cmd|' /C calc'!A0", "'-2+cmd|' /C calc'!A0"),
        ("@SUM(1)", "'@SUM(1)"),
        ("\t=1", "' =1"),
        ("\r\n=1", "'  =1"),
        ("\uff1d1", "'\uff1d1"),
        ("a\n1,2\x1b[2J", "a 1,2 [2J"),
        ("photo - old", "photo - old"),
    ],
)
def test_no_text_of_a_node_is_a_formula_or_a_line_of_its_own(
    reference: Callable[..., RunFolder], tmp_path: Path, domain: str, written: str
) -> None:
    run = reference(method="coop", num_server_rounds=1)
    folder = RunFolder(tmp_path)
    shutil.copy(run.path / "rounds.jsonl", tmp_path)
    folder.finish(load_settings(run.path), [{"client": 0, "domain": domain, "train": -1}])
    (row,) = folder.clients()
    assert row["domain"] == written
    assert row["train"] == -1  # a number stays one
    assert len((tmp_path / "clients.csv").read_bytes().splitlines()) == 2


def test_a_number_stands_under_its_name_whatever_the_order_of_a_nodes_sizes(
    reference: Callable[..., RunFolder], tmp_path: Path
) -> None:
    run = reference(method="coop", num_server_rounds=1)
    folder = RunFolder(tmp_path)
    shutil.copy(run.path / "rounds.jsonl", tmp_path)
    cards = [{"client": 0, "train": 1, "test": 2}, {"test": 4, "train": 3, "client": 1}]
    folder.finish(load_settings(run.path), cards)
    found = [(row["client"], row["train"], row["test"]) for row in folder.clients()]
    assert found == [(0, 1, 2), (1, 3, 4)]


def test_the_command_and_python_run_the_same() -> None:
    words = [f"{key}={value}" for key, value in SHORT.items()]
    assert cli.main(["run", "--method", "coop", "run-dir=typed", *words]) == 0
    result = pf.run(method="coop", run_dir="called", **SHORT)
    typed = pf.RunResult.read(Path("typed"))
    pd.testing.assert_frame_equal(result.clients, typed.clients)
    of_the_machine = {"seconds": 0, "peak_memory": 0}
    assert result.summary | of_the_machine == typed.summary | of_the_machine


def test_settings_are_names_of_python() -> None:
    settings = {
        "local_epochs": 1,
        "data": {"num_clients": 4, "path": Path("images")},
        "pfedmoap": {"lambda_": 0.1},
        "prompt.n-ctx": 2,
    }
    assert api.to_flat(settings) == {
        "local-epochs": 1,
        "data.num-clients": 4,
        "data.path": str(Path("images").resolve()),
        "pfedmoap.lambda": 0.1,
        "prompt.n-ctx": 2,
    }


def test_settings_go_over_a_file(tmp_path: Path) -> None:
    (tmp_path / "some.toml").write_text("seed = 4\n[data]\nalpha = 2.0\nnum-clients = 6\n")
    expected = {"seed": 5, "data.alpha": 2.0, "data.num-clients": 4}
    assert api.to_flat({"seed": 5, "data": {"num_clients": 4}}, "some.toml") == expected


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"loca_epochs": 1}, "did you mean 'local-epochs'"),
        ({"data": {"num_client": 1}}, "did you mean 'data.num-clients'"),
        ({"seed": "1"}, "setting seed='1': must be a whole number"),
        ({"seed": None}, "setting seed=None: must be a whole number"),
        ({"data": 3}, "unknown setting 'data'"),
        ({"resume": "/no/such/run"}, "no settings.json there"),
        ({"conf": "none.toml"}, "none.toml: cannot be read"),
        ({"engine": "cluster"}, "engine='cluster': must be one of in-process, ray"),
    ],
)
def test_wrong_settings_are_an_error_before_anything_is_computed(
    settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"^[^\n]*$") as raised:
        pf.run(**{**TINY, **settings})
    assert said in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_a_run_goes_on() -> None:
    first = pf.run(method="promptfl", **SHORT)
    before = first.rounds["personal_accuracy"]
    longer = pf.run(resume=first.folder, num_server_rounds=2)
    assert longer.folder == first.folder
    assert list(longer.rounds.index) == [0, 1, 2]
    assert longer.rounds["personal_accuracy"][:2].equals(before)


def test_compare_returns_each_run(tmp_path: Path) -> None:
    results = pf.compare(["coop", "zeroshot"], [0, 1], **SHORT)
    found = {
        name: [(run.summary["method"], run.summary["seed"]) for run in runs]
        for name, runs in results.items()
    }
    assert found == {name: [(name, 0), (name, 1)] for name in ("coop", "zeroshot")}
    (folder,) = (tmp_path / "runs").iterdir()
    assert {run.folder.parent for runs in results.values() for run in runs} == {folder}
    written = json.loads((folder / "comparison.json").read_text())
    assert written == {name: [run.summary for run in runs] for name, runs in results.items()}


def test_compare_checks_all_before_the_first_starts(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="must be one of"):
        pf.compare(["zeroshot", "fedmoap"], **SHORT)
    assert not list(tmp_path.iterdir())


def test_a_partition_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []

    def counting(images: Any, data: Any, seed: int) -> Any:
        seeds.append(seed)
        return partition(images, data, seed)

    monkeypatch.setattr(federated_module, "partition", counting)
    pf.run(method="promptfl", **{**SHORT, "seed": 71})
    assert seeds == [71]
    # A comparison goes over its seeds again for each method
    pf.compare(["coop", "zeroshot"], [81, 82, 83], **SHORT)
    assert sorted(seeds) == [71, 81, 82, 83]


def test_the_examples_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the tiny CLIP, which the examples do not name."""
    plan = api.plan
    monkeypatch.setattr(api, "plan", lambda values: plan({**TINY, **values}))
    found = doctest.testmod(api)
    assert found.attempted > 0
    assert found.failed == 0
