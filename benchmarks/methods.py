"""A round of every method beside a round of PromptFL: processor time and memory, in one run.

    python -m benchmarks.methods                   # all, emoji-domains, mini CLIP, 20 clients
    python -m benchmarks.methods --methods fedotp
    python -m benchmarks.methods --out FILE        # written after each method; goes on where it was
    python -m benchmarks.methods --quick           # to see that it works

Each method runs in a process of its own, client by client, with one local epoch. A round is
training and evaluation of all clients: the processor time of a run of three rounds less that of a
run of one, halved. Processor time and not the clock's, so that other work on the machine counts
little. Memory is by how much the run of three rounds raised what its process holds.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import in_fresh_process, peak_bytes, report
from pfedmoap_flwr import config, methods
from pfedmoap_flwr.engines.in_process import run_in_process

BASELINE = "promptfl"
SETTINGS: dict[str, Any] = {"local-epochs": 1, "clients-at-once": 1, "device": "cpu"}
QUICK: dict[str, Any] = {"data.num-clients": 5, "data.shots": 2}


def main() -> None:
    """Measure the baseline first, then each method, and print ratios to the baseline."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.methods")
    parser.add_argument("--methods", nargs="+", choices=methods.names(), default=methods.names())
    parser.add_argument("--out", type=Path, help="keep the cells here; what is there is not redone")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    chosen = ["coop"] if options.quick else [m for m in options.methods if m != BASELINE]
    settings = {**SETTINGS, **(QUICK if options.quick else {})}
    cells = _kept(options.out)
    for name in (BASELINE, *chosen):
        if name in cells:
            continue
        cells[name] = in_fresh_process(measure, name, settings)
        if options.out:
            options.out.write_text("".join(f"{json.dumps(cell)}\n" for cell in cells.values()))
    ratios = {}
    for name in chosen:
        for what in ("round_seconds", "peak_bytes"):
            kind = what.partition("_")[0]
            ratios[f"ratio_{kind}_{name}"] = cells[name][what] / cells[BASELINE][what]
    report("methods", torch.device("cpu"), list(cells.values()), **ratios)


def _kept(file: Path | None) -> dict[str, dict[str, Any]]:
    """Return the cells of an earlier, interrupted call, by method."""
    if file is None or not file.exists():
        return {}
    cells = [json.loads(line) for line in file.read_text().splitlines()]
    return {cell["method"]: cell for cell in cells}


def measure(method: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return a method's processor seconds of a round and the peak memory of a run, in bytes."""
    torch.set_num_threads(1)

    def run(num_rounds: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            places = {"run-dir": f"{folder}/run", "state-dir": f"{folder}/clients"}
            rounds = {"num-server-rounds": num_rounds, "min-nodes": 1}
            began = time.process_time()
            run_in_process(config.parse({**settings, **places, **rounds, "method": method}))
            return time.process_time() - began

    run(1)  # features are computed and towers loaded once
    one, times = run(1), []
    memory = peak_bytes(lambda: times.append(run(3)), torch.device("cpu"))
    seconds = (times[0] - one) / 2
    if seconds <= 0:
        raise SystemExit(f"{method}: a round is shorter than this machine's noise; run it again")
    return {"cell": "method", "method": method, "round_seconds": seconds, "peak_bytes": memory}


if __name__ == "__main__":
    main()
