"""The command: wrong use is one line and status 2, and nothing is left behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY

from pfedmoap_flwr import config
from pfedmoap_flwr.cli import main as cli

ROOT = Path(__file__).parent.parent
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


# In a process of its own: here, all of this is imported already
LIGHT = """
import sys
from pfedmoap_flwr.cli import main
try:
    status = main.main(sys.argv[1:])
except SystemExit as ended:
    status = ended.code
print(status, *{"torch", "flwr", "datasets", "open_clip"} & set(sys.modules), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["--help"], "0"),
        (["run", "--help"], "0"),
        (["run", "local-epoch=1"], "2"),
        (["run", "lr=-1"], "2"),
        (["run", "--method", "fedmoap"], "2"),
    ],
)
def test_help_and_a_wrong_setting_import_nothing_heavy(words: list[str], status: str) -> None:
    command = [sys.executable, "-c", LIGHT, *words]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stderr.splitlines()[-1] == status


def test_help_lists_the_settings_of_every_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["run", "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert "  data.num-clients             clients N" in lines
    keys = {line.split()[0] for line in lines if line.startswith("  ")}
    assert set(config.parse({"method": "coop"}).flat()) <= keys


def conf(text: str) -> str:
    Path("settings.toml").write_text(text)
    return "settings.toml"


def test_words_go_over_a_file_and_a_file_over_the_defaults(tmp_path: Path) -> None:
    file = conf(
        'method = "coop"\nseed = 4\nnum-server-rounds = 1\n[prompt]\nn-ctx = 2\n'
        '[data]\nalpha = 5.0\nnum-clients = 4\n[clip]\nmodel = "tiny"\npretrained = "tiny"\n'
    )
    words = ["device=cpu", "seed=5", "local-epochs=1", "run-dir=here"]
    assert cli.main(["run", "--in-process", "--conf", file, *words]) == 0
    settings = json.loads((tmp_path / "here" / "settings.json").read_text())
    assert (settings["method"], settings["seed"]) == ("coop", 5)
    assert (settings["prompt.n-ctx"], settings["clip.model"]) == (2, "tiny")
    assert settings["batch-size"] == 32
    options = cli._parse(["run", "--conf", file, "method=zeroshot", "--method", "promptfl"])
    assert cli._words(options)["method"] == "promptfl"


def test_compare_takes_a_file() -> None:
    options = cli._parse(["compare", "--conf", conf("lr = 1"), "batch-size=8"])
    assert cli._words(options) == {"lr": 1, "batch-size": 8}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "settings.toml: cannot be read"),
        ("seed = ", "settings.toml: not TOML"),
        ("[data]\nnum-client = 3", "unknown setting 'data.num-client'; did you mean"),
        ("[data]\nnum-clients = '3'", "setting data.num-clients='3': must be a whole number"),
        ("[data]\nname = ['a']", "setting data.name=['a']: must be a text"),
        ("[data.name]\nx = 1", "unknown setting 'data.name.x'"),
        ("device = 3", "setting device=3: must be one of"),
        ("\x00", "not TOML"),
    ],
)
def test_an_error_in_a_file_names_file_and_key(
    text: str | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        conf(text)
    for command in ("run", "compare"):
        assert cli.main([command, *WORDS, "--conf", "settings.toml"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("pfedmoap: settings.toml: ")
        assert error.count("\n") == 1
        assert said in error
