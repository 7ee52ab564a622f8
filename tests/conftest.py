"""Fixtures of all tests; what is no fixture is in support/."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pfedmoap_flwr import config
from pfedmoap_flwr.engines import in_process
from pfedmoap_flwr.engines.in_process import run_in_process
from pfedmoap_flwr.runs.folder import RunFolder
from support.federation import Exchange, Federate, recording
from support.tiny import TINY, write_clip, write_images


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def tiny_assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An assets folder with clip/tiny and a small emoji-domains; every test sees it first."""
    folder = tmp_path_factory.mktemp("assets")
    patch = pytest.MonkeyPatch()
    patch.setenv("PFEDMOAP_ASSETS", str(folder))
    patch.setenv("PFEDMOAP_CACHE", str(tmp_path_factory.mktemp("cache")))
    patch.setenv("PFEDMOAP_HOME", str(tmp_path_factory.mktemp("home")))
    write_clip(folder / "clip")
    write_images(folder / "emoji-domains")
    return folder


@pytest.fixture
def federate(tmp_path: Path) -> Federate:
    """Run a tiny federation in process; `changes` are flat settings with "_" for "-"."""

    def run(name: str = "run", **changes: Any) -> RunFolder:
        folder = tmp_path / name
        flat = {**TINY, "run-dir": str(folder), "state-dir": str(folder / "clients")}
        flat |= changes.pop("flat", {})
        flat |= {k if "." in k else k.replace("_", "-"): v for k, v in changes.items()}
        run_in_process(config.parse(flat))
        return RunFolder(folder)

    return run


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> list[Exchange]:
    """All that travels in the test's federations after the introductions, in order."""
    exchanges: list[Exchange] = []
    monkeypatch.setattr(in_process, "InProcessGrid", recording(exchanges))
    return exchanges
