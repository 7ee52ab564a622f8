"""Cells as the jobs of a SLURM array, by submitit, in a folder that all machines see."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pfedmoap_flwr import files
from pfedmoap_flwr.comparison.cells import Cell
from pfedmoap_flwr.comparison.jobs import Tell, run_here
from pfedmoap_flwr.errors import RunFailed, UsageError, last_line, reason_of

if TYPE_CHECKING:
    from submitit import DelayedSubmission, SlurmExecutor, SlurmJob

FOLDER, JOBS = "slurm", "jobs.json"
POLL_SECONDS = 2.0
MOST_TIMES = 20
"""How often a job is put back into the queue when its time is over: a cell may take many times."""
AT_WORK = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED", "RESIZING")
TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


class CellJob:
    """What a job does: the cell, from where it is. Out of time, it is put back and goes on."""

    def __call__(self, cell: Cell) -> str:
        """Run the cell; return why it failed, or ""."""
        reasons: list[str] = []
        if cell.state() != "done":  # by a job that was submitted before
            run_here([cell], lambda _, reason: reasons.append(reason))
        return "".join(reasons)

    def checkpoint(self, cell: Cell) -> "DelayedSubmission":
        """Return what submitit puts back into the queue: the rounds so far lie on disk."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, cell)


def run_on_slurm(cells: Sequence[Cell], tell: Tell, options: Mapping[str, str], root: Path) -> None:
    """Submit cells as one array and wait for all; jobs that an earlier start left are met again.

    options: of sbatch, as {"partition": "gpu", "time": "2:00:00"}.

    Raises:
        UsageError: submitit is missing, this is no SLURM machine, or an option is wrong.
        RunFailed: sbatch does not take the jobs.
    """
    executor = _executor(options, root / FOLDER)
    from submitit.helpers import as_completed

    jobs = _at_work(cells, root / FOLDER)
    new = [cell for cell in cells if cell not in jobs.values()]
    if new:
        try:
            submitted = executor.map_array(CellJob(), new)
        except Exception as error:  # whatever sbatch has against it
            raise RunFailed(f"sbatch: {reason_of(error)}") from error
        jobs |= dict(zip(submitted, new, strict=True))
    names = {cell.folder.name: job.job_id for job, cell in jobs.items()}
    files.replace(root / FOLDER / JOBS, json.dumps(names, indent=2))
    for job in as_completed(list(jobs), poll_frequency=POLL_SECONDS):
        gone = job.exception()
        tell(jobs[job], job.result() if gone is None else last_line(gone) or "the job is gone")


def read_options(text: str) -> dict[str, str]:
    """Return sbatch's options from "partition=gpu,time=2:00:00", none from "".

    Raises UsageError where one is no KEY=VALUE, or there is no time.
    """
    if not text:
        return {}
    parts = [part.partition("=") for part in text.split(",")]
    options = {key.strip().replace("-", "_"): value for key, sign, value in parts if sign and value}
    if len(options) < len(parts) or not TIME.fullmatch(options.get("time", "")):
        raise UsageError(
            f"--slurm {text}: must be KEY=VALUE,... of sbatch, each key once, with time=2:00:00"
        )
    return options


def minutes(text: str) -> int:
    """Return sbatch's time in whole minutes: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    found = TIME.fullmatch(text)
    if not found:
        raise ValueError(text)
    days, first, second, third = (int(part or 0) for part in found.groups())
    if found[1] is not None:
        seconds = ((24 * days + first) * 60 + second) * 60 + third
    elif found[4] is not None:
        seconds = (first * 60 + second) * 60 + third
    else:
        seconds = first * 60 + second
    return max(1, -(-seconds // 60))


def _executor(options: Mapping[str, str], folder: Path) -> "SlurmExecutor":
    try:
        from submitit import SlurmExecutor
    except ImportError:
        raise UsageError("--slurm needs submitit; install pfedmoap-flwr[slurm]") from None
    try:
        executor = SlurmExecutor(folder, max_num_timeout=MOST_TIMES)
    except RuntimeError as error:
        raise UsageError(f"--slurm: {last_line(error)}") from error
    known, others = executor._valid_parameters(), {}
    said: dict[str, Any] = {"job_name": "pfedmoap", "time": minutes(options["time"])}
    for key, value in options.items():
        if key not in known:
            others[key.replace("_", "-")] = value
        elif key != "time":
            said[key] = int(value) if value.isdecimal() else value
    executor.update_parameters(**said, additional_parameters=others)
    return executor


def _at_work(cells: Sequence[Cell], folder: Path) -> "dict[SlurmJob[str], Cell]":
    """Return the jobs of an earlier start that wait or run."""
    from submitit import SlurmJob

    path = folder / JOBS
    known = json.loads(path.read_text()) if path.exists() else {}
    jobs = {SlurmJob(folder, known[c.folder.name]): c for c in cells if c.folder.name in known}
    return {
        job: cell
        for job, cell in jobs.items()
        if job.watcher.get_state(job.job_id, mode="force").startswith(AT_WORK)
    }
