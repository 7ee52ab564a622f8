"""Each table and figure of the paper is one comparison whose runs can be set up."""

from pathlib import Path
from typing import Any

import pytest

from pfedmoap_flwr import config
from pfedmoap_flwr.cli.main import main
from pfedmoap_flwr.comparison.cells import grid
from pfedmoap_flwr.comparison.experiments import EXPERIMENTS, FIVE, Experiment, find
from pfedmoap_flwr.data.catalogue import find_source
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.runs.folder import load_settings
from support import ROOT
from support.tiny import TINY


def test_every_table_and_figure_with_a_file_is_one_and_is_in_the_page() -> None:
    files = {p.stem for p in (ROOT / "conf").glob("*.toml") if p.stem.startswith(("tab", "fig"))}
    assert EXPERIMENTS.keys() == files
    page = (ROOT / "docs" / "reproduce.md").read_text()
    assert [name for name in EXPERIMENTS if f"pfedmoap reproduce {name}" not in page] == []


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_all_its_runs_can_be_set_up(name: str, tmp_path: Path) -> None:
    experiment = find(name)
    values = config.parse_file(experiment.path())
    cells = grid(experiment.methods, [0], values, experiment.swept(), tmp_path)
    for cell in cells:
        settings = config.parse(dict(cell.values))
        assert find_source(settings.data.name).clients == settings.data.num_clients
    assert {cell.values["data.name"] for cell in cells} == set(experiment.sets)


def test_table_1_has_the_papers_rows(tmp_path: Path) -> None:
    experiment = find("table1")
    cells = grid(experiment.methods, [0], {}, experiment.swept(["dtd"]), tmp_path)
    assert [cell.label for cell in cells] == [
        "pfedmoap data.name=dtd pfedmoap.lambda=0.5",
        "pfedmoap data.name=dtd pfedmoap.lambda=0.0",
        *(f"{method} data.name=dtd" for method in experiment.methods[1:]),
    ]
    assert len(cells) == 11  # as many as Table 1 has
    assert experiment.sets == FIVE


def test_a_set_that_it_does_not_have_is_refused() -> None:
    with pytest.raises(UsageError, match="--only cifar10: must be one of flowers102"):
        find("table1").swept(["cifar10"])
    with pytest.raises(UsageError, match="there are table1"):
        find("table5")


def test_it_is_prepared_run_and_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Experiment("tiny", "table1", ("promptfl", "fedotp"), ("emoji-domains", "dtd"))
    monkeypatch.setitem(EXPERIMENTS, "table1", made)
    short: dict[str, Any] = {**TINY, "num-server-rounds": 1, "local-epochs": 1}
    words = [f"{key}={value}" for key, value in {**short, "data.num-clients": 2}.items()]
    typed = ["reproduce", "table1", "--only", "emoji-domains", "--seeds", "0", *words]
    assert main([*typed, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.count("features of train") == 2  # image features, and patch tokens for FedOTP
    run = load_settings(tmp_path / "promptfl-data.name=emoji-domains-s0")
    assert (run.data.partition, run.data.shots) == ("pathological", 16)  # the file's
    assert "fedotp data.name=emoji-domains" in out
    assert main([*typed, "--out", str(tmp_path)]) == 0
    assert "2 of 2 runs are done already" in capsys.readouterr().out


def test_without_a_name_it_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in EXPERIMENTS)
