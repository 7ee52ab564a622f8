"""Every benchmark runs in a small size and ends with one line of JSON."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from benchmarks import common
from support import ROOT

QUICK = {
    # benchmark: how many cells of each kind its quick run has
    "step": {
        "images": 1,
        "agreement": 1,
        "step": 2,
        "delivery": 1,
        "peak": 1,
        "10 prompts": 1,
        "template": 1,
    },
    "pool": {"pool": 3},
    "methods": {"method": 2},
    "attacks": {"attack": 2},
    "round --engines one-by-one at-once": {"round": 2},  # Ray takes half a minute to start
}


def last_line(benchmark: str) -> Any:
    """Run it with --quick on one thread and read its last line."""
    name, *options = benchmark.split()
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    del environment["PFEDMOAP_ASSETS"]  # the tests' own, which lack the bundled model
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_small_ratio_is_not_printed_as_none(capsys: pytest.CaptureFixture[str]) -> None:
    """A round of zero-shot takes a few hundredths of PromptFL's, less with more shots."""
    common.report("step", torch.device("cpu"), [], small=0.0041449, large=12.3456)
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (printed["small"], printed["large"]) == (0.00414, 12.3)


@pytest.mark.processes
@pytest.mark.parametrize("benchmark", QUICK)
def test_quick_run_ends_with_json(benchmark: str) -> None:
    result = last_line(benchmark)
    assert result["benchmark"] == benchmark.split()[0]
    assert {"device", "torch", "commit", "date"} <= result["environment"].keys()
    kinds = [cell["cell"] for cell in result["cells"]]
    assert {kind: kinds.count(kind) for kind in QUICK[benchmark]} == QUICK[benchmark]
    ratios = {key: value for key, value in result.items() if key.startswith("ratio")}
    for cell in [ratios, *result["cells"]]:
        assert all(value > 0 for key, value in cell.items() if key.startswith("ratio")), cell
        if cell.get("cell") == "agreement":
            assert max(cell["logits"], cell["gradient"]) < 1e-4
