"""Draw personal accuracy over rounds from the folder of a `pfedmoap compare`.

python scripts/plot_comparison.py runs/<time>-compare docs/images/comparison.png
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from pfedmoap_flwr.runs.folder import RunFolder


def curves(folder: Path) -> dict[str, np.ndarray]:
    """Return, by method, personal accuracy in percent (seeds, rounds + 1)."""
    found: dict[str, list[list[float]]] = defaultdict(list)
    for path in sorted(folder.glob("*/summary.json")):
        method = json.loads(path.read_text())["method"]
        values = [record.mean("personal-accuracy") for record in RunFolder(path.parent).rounds()]
        found[method].append([100 * value for value in values if value is not None])
    return {method: np.array(runs) for method, runs in found.items()}


def draw(by_method: dict[str, np.ndarray], path: Path) -> None:
    """Draw mean and range over seeds."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for method, runs in sorted(by_method.items(), key=lambda item: -item[1][:, -1].mean()):
        rounds = np.arange(runs.shape[1])
        (line,) = axes.plot(rounds, runs.mean(axis=0), label=method, linewidth=2)
        axes.fill_between(
            rounds, runs.min(axis=0), runs.max(axis=0), alpha=0.2, color=line.get_color()
        )
    axes.set(xlabel="round", ylabel="personal accuracy, mean over clients (%)")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(title=f"{len(next(iter(by_method.values())))} seeds, mean and range")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("image", type=Path)
    options = parser.parse_args()
    draw(curves(options.folder), options.image)
