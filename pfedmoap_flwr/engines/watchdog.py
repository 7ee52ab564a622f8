"""The process that ends what a run started in other processes, even where the run was killed.

    python -m pfedmoap_flwr.engines.watchdog HOME

Its standard input is a pipe from the run: it closes when the run ends, or is killed by the
kernel. Then every process that carries HOME in its environment is ended, orphans and Ray's
included, and the folder HOME is removed.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

# A SuperNode signs off first
GRACE_SECONDS = 10.0
MARK = "PFEDMOAP_PROCESSES_OF"
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Family:
    """Processes that end with this one, and a temporary folder that goes with them.

    home: the folder. environment: what they are started with.
    """

    def __init__(self, home: Path, environment: Mapping[str, str], log: Path) -> None:
        self.home = home
        self.environment = {**environment, MARK: str(home)}
        self._started: list[subprocess.Popen[bytes]] = []
        watch = [sys.executable, "-m", __name__, str(home)]
        with log.open("ab") as file:
            self._guard = subprocess.Popen(
                watch, stdin=subprocess.PIPE, stdout=file, stderr=file, start_new_session=True
            )

    def start(self, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """Start a process whose output goes to the end of a log."""
        with log.open("ab") as file:
            # A session of its own: Ctrl-C reaches this command alone, which then ends the rest
            process = subprocess.Popen(
                command, env=self.environment, stdout=file, stderr=file, start_new_session=True
            )
        self._started.append(process)
        return process

    def end(self) -> None:
        """Let the watchdog end all of them; a second Ctrl-C has to wait."""
        before = {number: signal.signal(number, signal.SIG_IGN) for number in STOPS}
        assert self._guard.stdin
        self._guard.stdin.close()
        # Whom nobody waits for is there still, in the watchdog's eyes
        for process in self._started:
            process.wait()
        self._guard.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def family(prefix: str, environment: Mapping[str, str], log: Path) -> Iterator[Family]:
    """Yield a Family; all of it ends with the block, or with this process."""
    started = Family(Path(tempfile.mkdtemp(prefix=prefix)), environment, log)
    try:
        yield started
    finally:
        started.end()


def main() -> None:
    """Wait for the end of the run, then end all that it started."""
    home = sys.argv[1]
    sys.stdin.buffer.read()
    end_all(home)
    shutil.rmtree(home, ignore_errors=True)


def end_all(home: str) -> None:
    """End all processes that carry a home, those that refuse by force."""
    # Twice by force: one that was about to start others may have done so
    for kill in (signal.SIGTERM, signal.SIGKILL, signal.SIGKILL):
        family = [process for process in psutil.process_iter() if _carries(process, home)]
        for member in family:
            with contextlib.suppress(psutil.Error):
                member.send_signal(kill)
        psutil.wait_procs(family, timeout=GRACE_SECONDS)


def _carries(process: psutil.Process, home: str) -> bool:
    try:
        return process.pid != os.getpid() and process.environ().get(MARK) == home
    except (psutil.Error, OSError):  # ended meanwhile, or somebody else's
        return False


if __name__ == "__main__":
    main()
