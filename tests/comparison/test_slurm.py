"""A comparison as jobs of a SLURM array, on a stand-in for sbatch, srun and sacct."""

from pathlib import Path
from typing import Any

import pytest

from pfedmoap_flwr.cli.main import main
from pfedmoap_flwr.comparison.cells import Cell
from pfedmoap_flwr.comparison.slurm import CellJob, minutes, read_options, run_on_slurm
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.runs.folder import RunFolder
from support.federation import rounds, tensor_files
from support.slurm import stand_in
from support.tiny import TINY

submitit = pytest.importorskip("submitit")

SHORT: dict[str, Any] = {**TINY, "num-server-rounds": 1, "local-epochs": 1}
OPTIONS = "partition=gpu,time=2:00:00,gres=gpu:1,cpus-per-task=4,licenses=one"


def typed(out: Path, *more: str) -> list[str]:
    settings = [f"{key}={value}" for key, value in SHORT.items()]
    names = ["--methods", "coop,promptfl", "--seeds", "0"]
    return ["compare", *names, "--out", str(out), *more, *settings]


@pytest.mark.processes
def test_a_comparison_runs_as_an_array_and_leaves_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = stand_in(tmp_path, monkeypatch)
    # A job has the machine's threads, this process one, and sums differ by that in the last bit
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert main(typed(tmp_path / "slurm", "--slurm", OPTIONS)) == 0, (home / "log").read_text()
    (script,) = home.glob("*.sbatch")
    lines = script.read_text().splitlines()
    for line in ("partition=gpu", "time=120", "gres=gpu:1", "cpus-per-task=4", "licenses=one"):
        assert f"#SBATCH --{line}" in lines
    assert "#SBATCH --array=0-1%2" in lines
    assert main(typed(tmp_path / "here")) == 0
    for name in ("coop-s0", "promptfl-s0"):
        run, other = RunFolder(tmp_path / "slurm" / name), RunFolder(tmp_path / "here" / name)
        assert rounds(run) == rounds(other)
        assert tensor_files(run) == tensor_files(other)
    # All is done: nothing is submitted
    assert main(typed(tmp_path / "slurm", "--slurm", OPTIONS)) == 0
    assert list(home.glob("*.sbatch")) == [script]
    assert "2 of 2 runs are done already" in capsys.readouterr().out


def test_jobs_of_an_earlier_start_are_met_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = stand_in(tmp_path, monkeypatch)
    monkeypatch.setenv("HELD", "yes")
    cells = [
        Cell(name, 0, {**SHORT, "method": name}, tmp_path / name) for name in ("coop", "fedper")
    ]
    met: list[list[str]] = []

    def stopped(jobs: list[Any], poll_frequency: float) -> Any:
        met.append(sorted(job.job_id for job in jobs))
        return []

    monkeypatch.setattr(submitit.helpers, "as_completed", stopped)
    options = read_options(OPTIONS)
    run_on_slurm(cells, lambda cell, reason: None, options, tmp_path)
    run_on_slurm(cells, lambda cell, reason: None, options, tmp_path)
    assert met[0] == met[1]
    assert len(list(home.glob("*.sbatch"))) == 1
    # Those that ended without a result are submitted anew
    monkeypatch.setenv("STATE", "CANCELLED by 0")
    submitit.SlurmJob.watcher.clear()
    run_on_slurm(cells, lambda cell, reason: None, options, tmp_path)
    assert met[2] != met[0]


def test_a_job_says_why_its_cell_failed_and_leaves_a_done_one(tmp_path: Path) -> None:
    good = Cell("coop", 0, {**SHORT, "method": "coop"}, tmp_path / "good")
    assert CellJob()(good) == ""
    before = tensor_files(RunFolder(good.folder))
    assert CellJob().checkpoint(good).function(good) == ""
    assert tensor_files(RunFolder(good.folder)) == before
    bad = Cell("coop", 0, {**SHORT, "method": "coop", "lr": 1e20}, tmp_path / "bad")
    assert "lower the learning rate" in CellJob()(bad)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("90", 90),
        ("90:01", 91),
        ("2:00:00", 120),
        ("1-0", 1440),
        ("1-2:30", 1590),
        ("0-0:0:30", 1),
        ("0:30", 1),
    ],
)
def test_times_are_slurms(text: str, found: int) -> None:
    assert minutes(text) == found


@pytest.mark.parametrize("text", ["partition=gpu", "time=", "time=soon", "gpu,time=5", "a=1,a=2"])
def test_wrong_options_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"must be KEY=VALUE,... of sbatch"):
        read_options(text)


def test_a_machine_without_slurm_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(typed(tmp_path / "out", "--slurm", "time=5")) == 2
    assert 'Could not detect "srun"' in capsys.readouterr().err
    assert main(typed(tmp_path / "out", "--slurm", "time=5", "--jobs", "2")) == 2
    assert "one of them" in capsys.readouterr().err
    assert main(["reproduce", "table1", "--slurm", "time=5", "--jobs", "2"]) == 2
    assert "one of them" in capsys.readouterr().err
