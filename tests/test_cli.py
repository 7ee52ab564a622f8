"""The command: wrong use is one line and status 2, and nothing is left behind."""

import json
from pathlib import Path

import pytest
from conftest import TINY

from pfedmoap_flwr import cli

WORDS = [f"{key}={value}" for key, value in TINY.items()]


@pytest.fixture(autouse=True)
def _somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["local-epoch=1"], "did you mean 'local-epochs'"),
        (["local-epochs=one"], "must be a whole number"),
        (["--method", "fedmoap"], "must be one of coop, pfedmoap"),
        (["data.name=imagenet"], "unknown data set"),
        (["data.num-clients=3"], "multiple of the 2 domains"),
        (["clip.pretrained=/no/such/weights.pt"], "no such file"),
        (["clip.model=ViT-B-17"], "did you mean"),
        (["resume=/no/such/run"], "no settings.json there"),
        (["device=cud"], "did you mean 'cuda'"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["run", "--in-process", *WORDS, *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pfedmoap: ")
    assert error.count("\n") == 1
    assert said in error
    assert not list(tmp_path.iterdir())


def test_a_run_prints_its_table_and_leaves_its_folder_here(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["run", *WORDS, "--method", "promptfl", "seed=3", "--in-process"]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.endswith("-promptfl-emoji-domains-s3")
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["method"], summary["seed"], summary["rounds"]) == ("promptfl", 3, 2)
    printed = capsys.readouterr().out
    assert f"{summary['personal_accuracy']:.1%}" in printed
    assert folder.name in printed


def test_compare_gives_mean_and_spread(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["compare", "--methods", "coop,zeroshot", "--seeds", "0,1", *WORDS]
    assert cli.main(words) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    summaries = json.loads((folder / "comparison.json").read_text())
    assert {name: [run["seed"] for run in runs] for name, runs in summaries.items()} == {
        "coop": [0, 1],
        "zeroshot": [0, 1],
    }
    assert "±" in capsys.readouterr().out


def test_an_unknown_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", "--verbosely"])
    assert ended.value.code == 2
