"""What a client keeps between messages: its whole head, on its own disk, one file a round.

Files carry their round so that a server that resumes from round t finds the client as it was after
round t, even where the client had gone further.
"""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save
from torch import Tensor

from pfedmoap_flwr import files


class KeptHeads:
    """The saved heads of one client in one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, *, before: int) -> dict[str, Tensor] | None:
        """Return the newest head saved in a round < before, or None where there is none."""
        rounds = [r for r in self._rounds() if r < before]
        return load_file(self._path(max(rounds))) if rounds else None

    def save(self, server_round: int, head: Mapping[str, Tensor]) -> None:
        """Save a round's head whole or not at all; keep only the newest one before it as well."""
        self.folder.mkdir(parents=True, exist_ok=True)
        files.replace(self._path(server_round), save(dict(head)))
        earlier = sorted(r for r in self._rounds() if r < server_round)
        later = [r for r in self._rounds() if r > server_round]
        for stale in [*earlier[:-1], *later]:
            self._path(stale).unlink(missing_ok=True)

    def _path(self, server_round: int) -> Path:
        return self.folder / f"round-{server_round:05d}.safetensors"

    def _rounds(self) -> list[int]:
        return [int(p.stem.split("-")[1]) for p in self.folder.glob("round-*.safetensors")]
