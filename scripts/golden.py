"""Write the golden metrics: three short rounds of methods on the embedded data and CLIP.

python scripts/golden.py [METHOD ...]: all methods, or these. Run it when a method's numbers change
on purpose, and say in the commit why they do.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from pfedmoap_flwr import config, methods
from pfedmoap_flwr.engines.in_process import run_in_process
from pfedmoap_flwr.runs.folder import RunFolder

FOLDER = Path(__file__).parents[1] / "tests" / "paper" / "golden"
SETTINGS: dict[str, Any] = {
    "num-server-rounds": 3,
    "local-epochs": 1,
    "data.shots": 1,
    "fraction-train": 0.25,
    "eval-every": 3,
    "device": "cpu",
    "clients-at-once": 1,
}


def golden(method: str, folder: Path) -> list[dict[str, Any]]:
    """Return a method's loss, accuracies and bytes of each round; the run goes to `folder`."""
    places = {"run-dir": str(folder), "state-dir": str(folder / "clients")}
    run_in_process(config.parse({**SETTINGS, **places, "method": method}))
    return [
        {
            "round": record.round,
            "loss": record.train_loss,
            "personal": record.mean("personal-accuracy"),
            "global": record.mean("global-accuracy"),
            "down": sum(record.bytes_down.values()),
            "up": sum(record.bytes_up.values()),
        }
        for record in RunFolder(folder).rounds()
    ]


def main() -> None:
    """Write a file for each method."""
    for method in sys.argv[1:] or methods.names():
        with tempfile.TemporaryDirectory() as folder:
            rounds = golden(method, Path(folder) / "run")
        lines = ",\n".join(json.dumps(each) for each in rounds)
        (FOLDER / f"{method}.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
