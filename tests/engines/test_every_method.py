"""Every method under Flower and Ray: the same numbers as in one process."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from pfedmoap_flwr import methods
from pfedmoap_flwr.runs.folder import RunFolder
from support import ROOT
from support.deployment import processes
from support.federation import Federate, rounds, tensor_files
from support.tiny import NUM_CLIENTS, TINY

pytestmark = pytest.mark.processes
OPTIONS: dict[str, Any] = {"num-server-rounds": 2, "local-epochs": 1}


@pytest.fixture(scope="module")
def under_ray(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds of every method in one simulation, each in a folder by its name."""
    folder = tmp_path_factory.mktemp("ray")
    runs = [
        {
            **TINY,
            **OPTIONS,
            "method": name,
            "run-dir": str(folder / name),
            "state-dir": str(folder / name / "clients"),
        }
        for name in methods.names()
    ]
    (folder / "runs.json").write_text(json.dumps(runs))
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    with processes(folder, PYTHONPATH=path) as started:
        started.run([sys.executable, "-m", "support.flower_methods", str(folder / "runs.json")])
    return folder


@pytest.mark.parametrize("method", methods.names())
def test_6_every_method_trains_under_ray_as_in_process(
    method: str, under_ray: Path, federate: Federate
) -> None:
    run, expected = RunFolder(under_ray / method), federate(method=method, flat=OPTIONS)
    assert not any(record.failed for record in run.rounds())
    assert set(run.rounds()[-1].clients) == set(range(NUM_CLIENTS))
    assert rounds(run) == rounds(expected)
    assert tensor_files(run) == tensor_files(expected)
