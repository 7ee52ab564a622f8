"""What a client keeps between messages: its whole head, on its own disk, one file a round.

Files carry their round so that a server that resumes from round t finds the client as it was after
round t, even where the client had gone further.
"""

import contextlib
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from pfedmoap_flwr import files
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.base import Head
from pfedmoap_flwr.training.exchange import check_state

KEPT_ROUNDS = 3
"""Of each run: a server may go back by two checkpoints, and lose the round it was in besides."""
KEPT_RUNS = 20
"""Of each client: a node's disk does not fill up; a run that is older cannot be resumed there."""

MODEL = "personal.safetensors"
"""Beside a node's kept heads: its personal model as it was last measured, which no run reads."""

RUN_ID = re.compile("[0-9a-f]{32}")
FILE = re.compile(r"round-(\d{5,})\.safetensors")
logger = logging.getLogger("flwr.pfedmoap")


def state_folder(named: str) -> Path:
    """Return the folder of clients' state that a setting names, or this machine's own."""
    home = Path(os.environ.get("PFEDMOAP_HOME", "~/.pfedmoap")) / "clients"
    return Path(named or home).expanduser()


def folder_of(state: Path, run_id: object, client_id: int) -> Path:
    """Return where a client keeps its heads of a run.

    Raises UsageError where that would lie outside the state folder: the id came in a message.
    """
    if not isinstance(run_id, str) or not RUN_ID.fullmatch(run_id):
        raise UsageError(
            f"a run's id is 32 hexadecimal digits; a message names run {str(run_id)[:40]!r}"
        )
    folder = state.resolve() / run_id / f"client-{client_id}"
    if folder.resolve() != folder:
        raise UsageError(f"run {run_id}: a link in the state folder leads out of it; remove it")
    return folder


class KeptHeads:
    """The saved heads of one client in one run.

    like: a head of the run's method; what is kept must be the state of such a one.
    """

    def __init__(self, folder: Path, like: Head | None = None) -> None:
        self.folder = folder
        self.like = like

    def load(self, *, before: int, trained: int = 0) -> dict[str, Tensor] | None:
        """Return the newest usable head saved in a round < before, or None where there is none.

        trained: the last round in which the client is known to have trained. Where its head is
        gone or damaged, the log says so.
        """
        for server_round in sorted((r for r in self._rounds() if r < before), reverse=True):
            path = self._path(server_round)
            try:
                tensors = load_file(path)
                if self.like is not None:
                    check_state(tensors, self.like)
            except (OSError, SafetensorError, ValueError) as error:
                logger.warning("%s cannot be used (%s); the one before is looked for", path, error)
                continue
            if server_round < trained:
                logger.warning(
                    "%s: the head of round %d is gone; the client goes on from that of round %d",
                    self.folder,
                    trained,
                    server_round,
                )
            return tensors
        if trained:
            logger.warning(
                "%s: the client trained in round %d and no usable head is there; what is personal "
                "starts anew",
                self.folder,
                trained,
            )
        return None

    def save(self, server_round: int, head: Mapping[str, Tensor], best: int = 0) -> None:
        """Save a round's head whole or not at all; keep only the newest ones before it as well.

        best: a round whose head, the newest up to then, is kept too; 0: none.

        Raises OSError, and then the heads of before are there.
        """
        first = not self.folder.is_dir()
        files.make_folder(self.folder)
        files.replace(self._path(server_round), save(dict(head)))
        rounds = self._rounds()
        earlier = sorted(r for r in rounds if r < server_round)
        later = [r for r in rounds if r > server_round]
        kept = [r for r in earlier if r <= best][-1:]
        for stale in [*(r for r in earlier[: 1 - KEPT_ROUNDS] if r not in kept), *later]:
            self._path(stale).unlink(missing_ok=True)
        if first:
            self._forget_old_runs()

    def _forget_old_runs(self) -> None:
        """Remove this client's heads of all runs but those that were last written to."""
        newest: dict[Path, float] = {}
        for folder in self.folder.parent.parent.glob(f"*/{self.folder.name}"):
            if RUN_ID.fullmatch(folder.parent.name):
                with contextlib.suppress(FileNotFoundError):  # by another process of this node
                    newest[folder] = max(path.stat().st_mtime for path in [folder, *_kept(folder)])
        for folder in sorted(newest, key=newest.__getitem__)[:-KEPT_RUNS]:
            for path in _kept(folder):
                path.unlink(missing_ok=True)
            (folder / MODEL).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # somebody else's files, or another client's
                folder.rmdir()
                folder.parent.rmdir()

    def _path(self, server_round: int) -> Path:
        return self.folder / f"round-{server_round:05d}.safetensors"

    def _rounds(self) -> list[int]:
        return [*_kept(self.folder).values()]


def _kept(folder: Path) -> dict[Path, int]:
    """Return the round of each kept file; "round-00002 (copy).safetensors" is none."""
    found = {path: FILE.fullmatch(path.name) for path in folder.glob("round-*.safetensors")}
    return {path: int(match[1]) for path, match in found.items() if match}
