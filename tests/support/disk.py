"""What reaches the disk, in order."""

import os
import stat
from pathlib import Path

import pytest


def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Write down each fsync, of a file with its size, and each rename from now on."""
    steps: list[str] = []
    sync, rename = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        found = os.fstat(descriptor)
        place = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        size = "" if stat.S_ISDIR(found.st_mode) else f" of {found.st_size} bytes"
        # A part's name is its writer's own
        steps.append(f"sync {'part' if place.endswith('.tmp') else place}{size}")
        sync(descriptor)

    def renamed(part: Path, place: Path) -> None:
        steps.append(f"rename to {place.name}")
        rename(part, place)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    return steps
