"""A run on the deployed SuperLink of this machine: checked, submitted, and followed to its end."""

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from pfedmoap_flwr.api import Plan, RunResult, settings_and_folder
from pfedmoap_flwr.clip.weights import find_weights
from pfedmoap_flwr.deploy.forget import forget_messages
from pfedmoap_flwr.deploy.site import read_env
from pfedmoap_flwr.engines.simulation import Ask, flower_environment, flwr, run_through
from pfedmoap_flwr.errors import RunFailed, UsageError
from pfedmoap_flwr.runs.place import make_folder, new_folder
from pfedmoap_flwr.settings import Value

PAUSE_SECONDS = 15.0
"""Before a run is submitted again: a SuperLink that was killed is started again meanwhile."""
OUTAGE_SECONDS = 120.0
ASK_AGAIN_SECONDS = 2.0


@dataclass(frozen=True)
class Server:
    """The server's folder of a kit, on the machine where its SuperLink runs."""

    folder: Path

    @property
    def database(self) -> Path:
        """Flower's database. Raises UsageError where the folder is no server's."""
        path = self.folder / "server.env"
        state = read_env(path, "server's").get("STATE", "")
        if not state:
            raise UsageError(f"{path} has no STATE; is this a server's folder?")
        return Path(state) / "state.db"

    def run(self, plan: Plan, console: Console) -> RunResult:
        """Run a plan to its end; no message of it stays in Flower's database, however it ends.

        Raises RunFailed with the reason. Says so where the database cannot be cleaned.
        """
        program = str(self.folder / "flwr.sh")
        ask = functools.partial(flwr, environment=flower_environment(), program=program)
        with console.status("waiting for the nodes ...") as live:
            try:
                run_through(through_outages(ask), plan.settings, plan.run_dir, live, None)
            finally:
                self._forget(console)
        return RunResult.read(plan.run_dir)

    def _forget(self, console: Console) -> None:
        try:
            forget_messages(self.database)
        except UsageError as error:
            # The run's own ending is what counts
            said = f"{error}: pfedmoap deploy forget {self.folder}"
            console.print(said, markup=False, highlight=False, soft_wrap=True)


def through_outages(ask: Ask) -> Ask:
    """Return what asks again, for two minutes, where a question about a run is not answered.

    A SuperLink that is being started again does not answer; what became of the run, it knows.
    Raises RunFailed with the last refusal. Only questions: a run might be submitted twice.
    """

    def asked(words: Sequence[str]) -> dict[str, Any]:
        deadline = time.monotonic() + OUTAGE_SECONDS
        while True:
            try:
                return ask(words)
            except RunFailed:
                if words[0] != "list" or time.monotonic() > deadline:
                    raise
                time.sleep(ASK_AGAIN_SECONDS)

    return asked


def plan_deployed(values: Mapping[str, Value]) -> Plan:
    """Check what can be checked on the server before a run is submitted. Raises UsageError."""
    settings, run_dir = settings_and_folder(values)
    find_weights(settings.clip.model, settings.clip.pretrained)
    run_dir = run_dir or new_folder(settings)
    make_folder("run-dir", run_dir)
    return Plan(settings.replace({"run-dir": str(run_dir)}), run_dir)
