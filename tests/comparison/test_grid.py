"""A comparison's folder is its state: done cells stay, half-done ones go on, failures are told."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import pfedmoap_flwr as pf
from pfedmoap_flwr.cli import words
from pfedmoap_flwr.cli.main import main
from pfedmoap_flwr.comparison.cells import Cell, grid
from pfedmoap_flwr.comparison.jobs import Clock
from pfedmoap_flwr.errors import RunFailed, UsageError
from pfedmoap_flwr.federation.strategy import PromptStrategy
from pfedmoap_flwr.runs.folder import RunFolder
from pfedmoap_flwr.settings import Value
from support.federation import rounds, tensor_files
from support.tiny import TINY

SHORT: dict[str, Any] = {**TINY, "num-server-rounds": 2, "local-epochs": 1}
WORDS = [f"{key}={value}" for key, value in SHORT.items()]
METHODS = ["coop", "promptfl"]


def typed(out: Path, *more: str) -> list[str]:
    return [
        "compare",
        "--methods",
        ",".join(METHODS),
        "--seeds",
        "0",
        "--out",
        str(out),
        *more,
        *WORDS,
    ]


# Which cells there are


def test_cells_are_methods_times_swept_values_times_seeds(tmp_path: Path) -> None:
    sweeps: dict[str, list[Value]] = {"lr": [0.001, 0.002], "pfedmoap.num-experts": [0, 2]}
    cells = grid(["pfedmoap", "promptfl"], [0, 1], SHORT, sweeps, tmp_path)
    assert [cell.label for cell in cells[:6]] == [
        "pfedmoap lr=0.001 pfedmoap.num-experts=0",
        "pfedmoap lr=0.001 pfedmoap.num-experts=2",
        "pfedmoap lr=0.002 pfedmoap.num-experts=0",
        "pfedmoap lr=0.002 pfedmoap.num-experts=2",
        "promptfl lr=0.001",
        "promptfl lr=0.002",
    ]
    assert [cell.seed for cell in cells] == [0] * 6 + [1] * 6
    assert cells[3].values["lr"] == 0.002
    assert cells[3].values["pfedmoap.num-experts"] == 2
    assert cells[-1].folder.name == "promptfl-lr=0.002-s1"
    assert len({cell.folder for cell in cells}) == 12


def test_a_run_twice_or_with_a_folder_of_its_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the run coop-s0 more than once"):
        grid(["coop", "coop"], [0], SHORT, {}, tmp_path)
    with pytest.raises(UsageError, match="run-dir: is for one run"):
        grid(["coop"], [0], {**SHORT, "run-dir": "x"}, {}, tmp_path)


def test_seeds_and_sweeps_are_read() -> None:
    assert words.read_seeds("0-3,7") == [0, 1, 2, 3, 7]
    assert words.read_sweeps(["lr=0.001,0.01", "data.partition=iid,shards"]) == {
        "lr": [0.001, 0.01],
        "data.partition": ["iid", "shards"],
    }


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("lr", "must be KEY=VALUE,VALUE"),
        ("seed=0,1", "have options of their own"),
        ("lr=0.1,0.1", "has a value twice"),
        ("lr=0.1,-1", "setting lr=-1"),
        ("lrr=0.1", "lrr"),
    ],
)
def test_a_wrong_sweep_is_one_line(word: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        words.read_sweeps([word])


@pytest.mark.parametrize("seeds", ["4-0", "1-", "-3", "0-x"])
def test_wrong_seeds_are_one_line(seeds: str) -> None:
    with pytest.raises(UsageError):
        words.read_seeds(seeds)


# What is done, half done, and failed


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a comparison that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "grid"
    assert main(typed(out)) == 0
    return out


def test_the_same_command_again_runs_nothing_and_reports(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*.jsonl")}
    assert main(typed(whole)) == 0
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*.jsonl")} == before
    said = capsys.readouterr().out
    assert "2 of 2 runs are done already" in said
    assert "Against" in said, "it ends in the report"
    assert "<h1>2 methods on emoji-domains</h1>" in (whole / "report.html").read_text()
    assert json.loads((whole / "comparison.json").read_text()).keys() == {"coop", "promptfl"}


def test_an_archive_without_states_is_done_and_reported_on(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "grid"
    shutil.copytree(whole, out, ignore=shutil.ignore_patterns("*.safetensors", "clients"))
    assert main(typed(out)) == 0
    assert "2 of 2 runs are done already" in capsys.readouterr().out
    assert not [*out.rglob("*.safetensors")]


def test_other_settings_in_the_same_folder_are_refused(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*typed(whole), "lr=0.5"]) == 2
    assert "setting lr=0.5: the run to resume has 0.002" in capsys.readouterr().err


def test_more_rounds_go_on_where_each_run_stopped(whole: Path, tmp_path: Path) -> None:
    values = {**SHORT, "method": "coop", "seed": 0, "num-server-rounds": 3}
    assert Cell("coop", 0, values, whole / "coop-s0").state() == "begun"
    assert Cell("coop", 0, {**values, "num-server-rounds": 2}, whole / "coop-s0").state() == "done"
    assert Cell("coop", 0, values, tmp_path / "coop-s0").state() == "new"


def test_a_stopped_comparison_goes_on_and_ends_with_the_same_bytes(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "grid"
    aggregate = PromptStrategy.aggregate_train

    def stopped(self: PromptStrategy, number: int, replies: Any) -> Any:
        if (self.settings.method, number) == ("promptfl", 2):
            raise KeyboardInterrupt
        return aggregate(self, number, replies)

    with monkeypatch.context() as patch:
        patch.setattr(PromptStrategy, "aggregate_train", stopped)
        assert main(typed(out)) == 130
    assert len(RunFolder(out / "promptfl-s0").rounds()) == 2
    assert main(typed(out)) == 0
    for name in ("coop-s0", "promptfl-s0"):
        run, expected = RunFolder(out / name), RunFolder(whole / name)
        assert rounds(run) == rounds(expected)
        assert tensor_files(run) == tensor_files(expected)


def test_a_run_without_a_checkpoint_begins_anew_and_other_files_stay(
    whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "grid"
    begun = out / "coop-s0"
    begun.mkdir(parents=True)
    (begun / "rounds.jsonl").write_bytes((whole / "coop-s0" / "rounds.jsonl").read_bytes())
    (begun / "thesis.tex").write_text("mine")
    assert main(typed(out)) == 0
    assert rounds(RunFolder(begun)) == rounds(RunFolder(whole / "coop-s0"))
    assert (begun / "thesis.tex").read_text() == "mine"


def test_a_run_that_fails_is_named_in_the_end_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(self: PromptStrategy, number: int, replies: Any) -> Any:
        if self.settings.method == "coop":
            raise ValueError("no such luck")
        return aggregate(self, number, replies)

    aggregate, out = PromptStrategy.aggregate_train, tmp_path / "grid"
    with monkeypatch.context() as patch:
        patch.setattr(PromptStrategy, "aggregate_train", broken)
        assert main(typed(out)) == 1
    printed = capsys.readouterr()
    assert "[1/2] coop, seed 0  failed: no such luck" in printed.out
    assert "coop, seed 0 failed: " in printed.err
    assert "1 of 2 runs failed; the same command with --out tries them again" in printed.err
    assert (out / "promptfl-s0" / "summary.json").exists()
    assert main(typed(out)) == 0
    assert "[1/1] coop, seed 0  personal" in capsys.readouterr().out


def test_from_python_a_failure_is_told_after_all_have_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: PromptStrategy, number: int, replies: Any) -> Any:
        raise ValueError(f"{self.settings.method} is broken")

    monkeypatch.setattr(PromptStrategy, "aggregate_train", broken)
    with pytest.raises(RunFailed, match=r"coop, seed 0 failed: coop is(.|\n)*promptfl, seed 0 fai"):
        pf.compare(METHODS, [0], out=tmp_path / "grid", **_python(SHORT))


def _python(flat: dict[str, Any]) -> dict[str, Any]:
    return {key.replace("-", "_"): value for key, value in flat.items()}


def test_from_python_a_sweep_has_a_result_for_each_value(tmp_path: Path) -> None:
    settings = _python({**SHORT, "num-server-rounds": 1})
    found = pf.compare(["coop"], [0], sweep={"lr": [0.1, 0.2]}, out=tmp_path / "grid", **settings)
    assert list(found) == ["coop lr=0.1", "coop lr=0.2"]
    assert [runs[0].summary["seed"] for runs in found.values()] == [0, 0]


# What it would cost


def test_a_dry_run_prints_the_cells_and_runs_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    out = tmp_path / "grid"
    assert main([*typed(out, "--dry-run", "--sweep", "lr=0.1,0.2")]) == 0
    said = capsys.readouterr().out
    assert "4 runs, nothing is run" in said
    assert "promptfl lr=0.2" in said
    assert "training of what is left: about" in said
    assert not list(out.rglob("settings.json"))


def test_the_clock_reckons_with_what_runs_took(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    clock = Clock(3)
    now[0] = 120.0
    assert clock.tick() == "about 4 min left"
    now[0] = 140.0
    assert clock.tick() == "about 70 s left"
    assert clock.tick() == ""


@pytest.mark.processes
def test_two_runs_at_once_on_ray_leave_the_same_bytes(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "grid"
    assert main(typed(out, "--jobs", "2")) == 0
    for name in ("coop-s0", "promptfl-s0"):
        run, expected = RunFolder(out / name), RunFolder(whole / name)
        assert rounds(run) == rounds(expected)
        assert tensor_files(run) == tensor_files(expected)
    assert "[2/2]" in capsys.readouterr().out
