"""The command: wrong use is one line and status 2, and nothing is left behind."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from pfedmoap_flwr import config, methods
from pfedmoap_flwr.cli import main as cli
from pfedmoap_flwr.cli import words as command_line
from pfedmoap_flwr.cli.compare import How
from support.tiny import TINY

WORDS = [f"{key}={value}" for key, value in TINY.items()]


@pytest.fixture(autouse=True)
def _somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["local-epoch=1"], "did you mean 'local-epochs'"),
        (["local-epochs=one"], "must be a whole number"),
        (["--method", "fedmoap"], f"must be one of {methods.names()[0]}, "),
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
    assert cli.main(["run", *WORDS, *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pfedmoap: ")
    assert error.count("\n") == 1
    assert said in error
    assert not list(tmp_path.iterdir())


def test_a_run_prints_its_table_and_leaves_its_folder_here(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["run", *WORDS, "--method", "promptfl", "seed=3"]) == 0
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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--verbosely"], "'--verbosely'; see pfedmoap run --help"),
        (["run", "--in-process"], "'--in-process'"),
        (["run", "--engine", "cluster"], "'cluster' is not one of 'in-process', 'ray'"),
        (["data", "show", "--figure"], "'--figure' requires an argument"),
        (["runs"], "'runs'"),
        ([], "see pfedmoap --help"),
        (["data"], "see pfedmoap data --help"),
        (["settings", "nothing.of.it"], "no setting begins with 'nothing.of.it'"),
        (["run", "just", "words"], "'just' is not KEY=VALUE"),
        (["compare", "--seeds", "0,one"], "seed='one': must be a whole number"),
        (["compare", "--seeds", "-1"], "seed=-1: must be >= 0"),
        (["compare", *WORDS, "--methods", "promptfl,fedmoap"], "must be one of"),
    ],
)
def test_what_cannot_be_typed_is_one_line_and_status_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("pfedmoap: ")
    assert error.count("\n") == 1
    assert said in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "seed=3", "--method", "coop", "lr=1"],
        ["run", "--method", "coop", "seed=3", "lr=1"],
        ["run", "seed=3", "lr=1", "--engine", "in-process", "--method=coop"],
    ],
)
def test_words_may_stand_anywhere(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("pfedmoap_flwr.cli.run.run_one", lambda *said: seen.append(said[:2]))
    assert cli.main(arguments) == 0
    assert seen == [({"seed": 3, "lr": 1.0, "method": "coop"}, "in-process")]


def conf(text: str) -> str:
    Path("settings.toml").write_text(text)
    return "settings.toml"


def test_words_go_over_a_file_and_a_file_over_the_defaults(tmp_path: Path) -> None:
    file = conf(
        'method = "coop"\nseed = 4\nnum-server-rounds = 1\n[prompt]\nn-ctx = 2\n'
        '[data]\nalpha = 5.0\nnum-clients = 4\n[clip]\nmodel = "tiny"\npretrained = "tiny"\n'
    )
    words = ["device=cpu", "seed=5", "local-epochs=1", "run-dir=here", "eval.below-chance=go-on"]
    assert cli.main(["run", "--conf", file, *words]) == 0
    settings = json.loads((tmp_path / "here" / "settings.json").read_text())
    assert (settings["method"], settings["seed"]) == ("coop", 5)
    assert (settings["prompt.n-ctx"], settings["clip.model"]) == (2, "tiny")
    assert settings["batch-size"] == 32
    values = command_line.read(["method=zeroshot"], [Path(file)], "promptfl")
    assert values["method"] == "promptfl"


def test_compare_takes_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("pfedmoap_flwr.cli.compare.compare_all", lambda *said: seen.append(said))
    file = conf("lr = 1")
    assert cli.main(["compare", "--conf", file, "batch-size=8", "--methods", "coop"]) == 0
    ((names, seeds, sweeps, values, how, _),) = seen
    assert (names, seeds, values) == (["coop"], [0, 1, 2], {"lr": 1, "batch-size": 8})
    assert (sweeps, how) == ({}, How())


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


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGHUP])
def test_a_closed_terminal_stops_a_run_as_a_kill_does(
    end: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {which: signal.getsignal(which) for which in (signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.setattr("pfedmoap_flwr.cli.run.run_one", lambda *_: os.kill(os.getpid(), end))
    try:
        assert cli.main(["run"]) == cli.STOPPED
        assert "pfedmoap: stopped" in capsys.readouterr().err
        # nohup pfedmoap run
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert cli.main(["run"]) == (0 if end == signal.SIGHUP else cli.STOPPED)
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)


# Help, settings, completion


def printed_settings(capsys: pytest.CaptureFixture[str], *prefix: str) -> dict[str, str]:
    """Every key that `pfedmoap settings` prints, with the text beside and below it."""
    assert cli.main(["settings", *prefix]) == 0
    texts: dict[str, str] = {}
    for line in capsys.readouterr().out.splitlines():
        assert len(line) <= 80
        cells = line.split(maxsplit=1)
        if len(cells) == 2 and not line.startswith(" "):
            key, texts[cells[0]] = cells[0], cells[1]
        elif line.startswith(" ") and line.strip():
            texts[key] += f" {line.strip()}"
    return {key: " ".join(text.split()) for key, text in texts.items()}


def test_settings_prints_every_key_with_default_bounds_and_help(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    printed = printed_settings(capsys)
    assert printed.keys() == config.known_keys().keys()
    assert printed["fraction-train"] == "1.0 fraction r of the clients that train (>0, <=1)"
    assert printed["compat"].startswith('"paper" ')
    assert printed["compat"].endswith("paper | released")
    assert printed["pfedmoap.gate-shared"].startswith("false ")
    assert printed["method"].endswith(": " + " | ".join(methods.names()))


def test_settings_prints_one_group(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    every = config.known_keys()
    for prefix in ("data", "data.sh", "pfedmoap.", "seed"):
        expected = [key for key in every if key.startswith(prefix)]
        assert list(printed_settings(capsys, prefix)) == expected
        assert expected


@pytest.mark.parametrize(
    "command", ["", "run", "compare", "doctor", "settings", "data", "data show", "data prepare"]
)
def test_help_fits_a_screen(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main([*command.split(), "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 30  # of the terminals that people open today, the lowest
    assert max(map(len, lines)) <= 80


HEAVY = ("torch", "flwr", "datasets", "open_clip", "ray", "matplotlib")
LOADED = f"""
import sys
from pfedmoap_flwr.cli.main import main
status = main(sys.argv[1:])
print(status, *[name for name in {HEAVY} if name in sys.modules])
"""


def python(code: str, arguments: Sequence[str] = (), **environment: str) -> str:
    """Run Python code in a new process and return the last line that it prints."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()[-1]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ("--help", 0),
        ("--version", 0),
        ("run --help", 0),
        ("data show --help", 0),
        ("run loca-epochs=1", 2),
        ("run local-epochs=0", 2),
        ("run lr=-1", 2),
        ("run --method fedmoap", 2),
        ("compare data.alpha=-1", 2),
        ("doctor --verbosely", 2),
    ],
)
def test_help_and_wrong_settings_load_nothing_heavy(arguments: str, status: int) -> None:
    assert python(LOADED, arguments.split()) == str(status)


@pytest.mark.processes
def test_what_is_loaded_is_seen() -> None:
    assert python("import torch\n" + LOADED, ["--help"]).startswith("0 torch")


@pytest.mark.processes
def test_the_package_itself_is_light() -> None:
    code = f"import sys, pfedmoap_flwr; print([n for n in {HEAVY} if n in sys.modules])"
    assert python(code) == "[]"


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.metadata import version

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"pfedmoap-flwr {version('pfedmoap-flwr')}\n"


@pytest.mark.processes
@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("run loc", "local-epochs="),
        ("run --method pfedm", "pfedmoap"),
        ("data pre", "prepare"),
        ("run pfedmoap.sel", "pfedmoap.selection="),
    ],
)
def test_the_shell_completes(typed: str, offered: str) -> None:
    line = f"pfedmoap {typed}"
    asked = {
        "_PFEDMOAP_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split()) - 1),
    }
    code = "from pfedmoap_flwr.cli.main import main; main([])"
    assert python(code, **asked) == offered
