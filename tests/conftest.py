"""Fixtures of all tests; what is no fixture is in support/."""

import functools
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pfedmoap_flwr.engines import in_process
from support.federation import (
    Exchange,
    Federate,
    Federation,
    Recorded,
    forget_data,
    recording,
    run_folders,
    run_tiny,
)
from support.tiny import write_clip, write_images


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _no_power_cuts() -> None:
    """Let files be written without a wait for the disk: a fifth of a tiny run's time."""
    pytest.MonkeyPatch().setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """What a test draws does not depend on the tests before it."""
    # Another seed than that of the models' weights, which a test's own are to differ from
    torch.manual_seed(17)
    random.seed(17)


@pytest.fixture(scope="session", autouse=True)
def tiny_assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An assets folder with clip/tiny and a small emoji-domains; every test sees it first."""
    folder = tmp_path_factory.mktemp("assets")
    cache = tmp_path_factory.getbasetemp() / "cache"
    if "PYTEST_XDIST_WORKER" in os.environ:
        # One for all workers: the embedded images are passed through CLIP once
        cache = cache.parents[1] / "cache"
    patch = pytest.MonkeyPatch()
    patch.setenv("PFEDMOAP_ASSETS", str(folder))
    patch.setenv("PFEDMOAP_CACHE", str(cache))
    patch.setenv("PFEDMOAP_HOME", str(tmp_path_factory.mktemp("home")))
    write_clip(folder / "clip")
    write_images(folder / "emoji-domains")
    return folder


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The embedded data and CLIP in the place of the tests' own."""
    forget_data()
    monkeypatch.delenv("PFEDMOAP_ASSETS")
    yield
    forget_data()


@pytest.fixture
def federate(tmp_path: Path) -> Federate:
    """Run a tiny federation in a folder of the test's own."""
    return lambda name="run", **changes: run_tiny(tmp_path / name, **changes)


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    """Run nodes that each have a folder of images, in a folder of the test's own."""
    return functools.partial(run_folders, tmp_path / "run")


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Recorded]:
    """Return the run with these settings, and what travelled; for tests that change nothing in it.

    It is run once in a session, so ask for it before anything is patched.
    """

    @functools.cache
    def run(**changes: Any) -> Recorded:
        exchanges: list[Exchange] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(in_process, "InProcessGrid", recording(exchanges))
            folder = run_tiny(tmp_path_factory.mktemp("reference") / "run", **changes)
        return Recorded(folder, exchanges)

    return run


@pytest.fixture(scope="session")
def reference(recorded: Callable[..., Recorded]) -> Federate:
    """Return the run with these settings, as `recorded` does."""
    return lambda **changes: recorded(**changes).run


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> list[Exchange]:
    """All that travels in the test's federations after the introductions, in order."""
    exchanges: list[Exchange] = []
    monkeypatch.setattr(in_process, "InProcessGrid", recording(exchanges))
    return exchanges
