"""A round of many clients: Ray's simulation against the in-process engine, on the same settings.

    python -m benchmarks.round            # 10 and 100 clients, mini CLIP, emoji-domains
    python -m benchmarks.round --quick    # seconds, to see that it works

Every engine runs the same ServerApp and ClientApp through the command `pfedmoap run`. A round is
what the run folder says (training and evaluation of all clients); rounds 0 and 1 are left out: in
the first nobody borrows yet. A run is the whole command, from its start to its table.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import report
from pfedmoap_flwr.clip.load import resolve_device

ENGINES = {
    "ray": ["--engine", "ray"],
    "one-by-one": ["clients-at-once=1"],
    "at-once": [],
}


def main() -> None:
    """Measure every engine at every number of clients and print the ratios to Ray."""
    options = _parser().parse_args()
    clients = [10] if options.quick else options.clients
    settings = [f"num-server-rounds={2 if options.quick else options.rounds}", *options.settings]
    if options.quick:
        settings += ["local-epochs=1", "data.shots=1"]
    device = resolve_device("auto")
    _run([], [*settings, "num-server-rounds=1", "data.num-clients=10"])  # features
    cells, ratios = [], {}
    for count in clients:
        of_engine: dict[str, dict[str, Any]] = {}
        for engine in options.engines:
            words = [*settings, f"data.num-clients={count}"]
            of_engine[engine] = {
                "cell": "round",
                "clients": count,
                "engine": engine,
                **_run(ENGINES[engine], words),
            }
            cells.append(of_engine[engine])
        if "ray" in of_engine:
            for engine, cell in of_engine.items():
                for what in ("round", "run"):
                    key = f"ratio_{what}_{count}_{engine.replace('-', '_')}"
                    ratios[key] = of_engine["ray"][f"{what}_seconds"] / cell[f"{what}_seconds"]
    ratios = {key: value for key, value in ratios.items() if not key.endswith("_ray")}
    report("round", device, cells, **ratios)


def _run(engine: list[str], settings: list[str]) -> dict[str, Any]:
    """Return the seconds of the whole command and of its rounds, and the accuracy it ended with."""
    with tempfile.TemporaryDirectory() as folder:
        words = [*settings, f"run-dir={folder}/run"]
        command = [sys.executable, "-m", "pfedmoap_flwr.cli", "run", *engine, *words]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        run_seconds = time.perf_counter() - start
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
        lines = (Path(folder) / "run" / "rounds.jsonl").read_text().splitlines()
    rounds = [json.loads(line) for line in lines]
    clients = rounds[-1]["clients"].values()
    return {
        "round_seconds": statistics.median(r["seconds"] for r in rounds[2:] or rounds[1:]),
        "run_seconds": run_seconds,
        "personal_accuracy": statistics.mean(c["personal-accuracy"] for c in clients),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.round")
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings of every run")
    return parser


if __name__ == "__main__":
    main()
