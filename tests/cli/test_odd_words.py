"""Odd words on the command line: one line that names the setting, status 2, nothing left behind."""

from pathlib import Path

import pytest

from pfedmoap_flwr import api
from pfedmoap_flwr.cli import main as cli
from pfedmoap_flwr.errors import UsageError
from support.federation import run_tiny
from support.tiny import TINY

WORDS = [f"{key}={value}" for key, value in TINY.items()]
HUGE = 10**9


@pytest.fixture(autouse=True)
def _somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one short line with which the command ends, status 2."""
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("pfedmoap: ")
    assert error.count("\n") == 1
    assert len(error) < 1000
    return error


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("batch-size=1" + 25 * "0", "must be a whole number up to 9223372036854775807"),
        ("lr=1e308", "setting lr=1e+308: must be a number up to 1e+30"),
        ("pfedmoap.gate-lr=1e308", "must be a number up to 1e+30"),
        (f"data.num-clients={HUGE}", "every client needs one"),
        (f"data.shards-per-client={HUGE}", "shards of 4 clients"),
        ("run-dir=" + 5000 * "a", "File name too long"),
        ("run-dir=~nosuchuser/x", "Could not determine home directory"),
        ("run-dir=a\udce9", "must be text in UTF-8"),
        ("run-dir=file/run", "file is no folder that can be written"),
        ("run-dir=file", "file': is a file; give another"),
        ("run-dir=/proc/x", "No such file or directory"),
        ("resume=~nosuchuser/x", "Could not determine home directory"),
        ("data.path=~nosuchuser/x", "Could not determine home directory"),
        ("data.path=" + 5000 * "a", "File name too long"),
        ("data.classnames=" + 5000 * "a", "File name too long"),
        ("clip.pretrained=" + 5000 * "a", "File name too long"),
        (5000 * "a", "is not KEY=VALUE"),
        (5000 * "a" + "=1", "unknown setting"),
        ("seed=" + 4000 * "a", "must be a whole number"),
        ("seed=" + 5000 * "1", "must be a whole number"),
        ("method=" + 5000 * "a", "must be one of"),
        ("method=", "must be one of"),
        ("data.template=hello", "must hold {} once"),
        ("data.template={", "must hold {} once"),
        ("data.template={x}", "must hold {} once"),
        ("data.template={0.__class__.__init__.__globals__}", "must hold {} once"),
        ("data.template={!r:{}}", "must hold {} once"),
        ("data.template={:>999999999}", "must hold {} once"),
        ("data.template=" + 10**5 * "{}", "must hold {} once"),
        ("state-dir=here", "setting state-dir: is for deployments"),
        ("min-nodes=99", "setting min-nodes: is for deployments"),
    ],
)
def test_an_odd_word_is_refused_in_one_line(
    word: str, said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    iid = [] if "clip." in word else ["data.partition=shards"]
    assert said in refused(capsys, "run", *WORDS, *iid, word)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_nul_in_a_text_is_refused() -> None:
    for key in ("run-dir", "resume", "data.path", "data.classnames", "prompt.names"):
        with pytest.raises(UsageError, match=rf"setting {key}=.*null byte"):
            api.to_flat({key: "a\0b"})


@pytest.mark.parametrize(
    "text",
    [
        "a = " + 5000 * "[" + 5000 * "]",
        "a = " + 5000 * "{a=" + "1" + 5000 * "}",
        "[" + ".".join(5000 * ["a"]) + "]\nb = 1",
    ],
)
def test_a_file_nested_without_end_is_one_line(
    text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "odd.toml").write_text(text)
    said = refused(capsys, "run", "--conf", "odd.toml")
    assert "odd.toml: not settings (tables or lists nested too deep)" in said


def test_home_is_a_folder_of_settings_that_are_paths(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    plan = api.plan(api.to_flat({**TINY, "run-dir": "~/x"}))
    assert plan.run_dir == tmp_path / "home" / "x"
    assert plan.settings.run_dir == str(plan.run_dir)


def test_files_of_settings_are_found_from_any_folder(tmp_path: Path) -> None:
    (tmp_path / "tiny.json").touch()
    given = {"clip.pretrained": "tiny.json", "prompt.names": "tiny.json", "data.path": "images"}
    found = api.to_flat(given)
    assert found == {
        "clip.pretrained": str(tmp_path / "tiny.json"),
        "prompt.names": str(tmp_path / "tiny.json"),
        "data.path": str(tmp_path / "images"),
    }
    # Not a file: the name of weights, a list
    kept = {"clip.pretrained": "openai", "data.classnames": "cat,dog"}
    assert api.to_flat(kept) == kept


def test_a_resumed_run_stays_in_its_folder_and_loses_no_round(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = run_tiny(tmp_path / "run", method="coop", num_server_rounds=2)
    lines = (run.path / "rounds.jsonl").read_bytes()
    resume = f"resume={run.path}"
    said = refused(capsys, "run", resume, "num-server-rounds=1")
    assert "the run to resume has done 2 rounds already" in said
    said = refused(capsys, "run", resume, "num-server-rounds=3", "run-dir=other")
    assert "a resumed run goes on in its own folder" in said
    for word in (resume, "run-dir=other"):
        assert "is for one run" in refused(capsys, "compare", "--methods", "coop", word)
    assert (run.path / "rounds.jsonl").read_bytes() == lines
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("method", ["pfedmoap", "promptfl"])
def test_a_longer_context_than_the_tower_reads_is_refused(tmp_path: Path, method: str) -> None:
    with pytest.raises(UsageError, match="too many; shorten the name or the prompt"):
        run_tiny(tmp_path / "run", **{"method": method, "prompt.n-ctx": HUGE})


def test_a_batch_is_never_larger_than_the_images_there_are(tmp_path: Path) -> None:
    short = {"method": "promptfl", "num_server_rounds": 1, "clients_at_once": 0}
    whole = run_tiny(tmp_path / "whole", batch_size=10**4, **short)
    huge = run_tiny(tmp_path / "huge", batch_size=10**18, **short)
    assert [r.clients for r in huge.rounds()] == [r.clients for r in whole.rounds()]
    assert huge.rounds()[1].train_loss == whole.rounds()[1].train_loss
