"""Draw one local step against the usual form, from the last line of `make bench-step`.

python scripts/plot_performance.py docs/benchmarks/step.json docs/images/performance.png
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

MODEL = "ViT-B-16"
USUAL, OURS = "tab:gray", "tab:blue"


def steps(result: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Return, by number of classes, the step cells without experts."""
    cells = [cell for cell in result["cells"] if cell["cell"] == "step" and cell["K"] == 0]
    return {cell["C"]: cell for cell in cells if cell["model"] == MODEL}


def bars(axes: Axes, cells: dict[int, dict[str, Any]], columns: tuple[str, str], unit: str) -> None:
    """Draw two columns side by side for every C, and how many times less ours is."""
    places = np.arange(len(cells))
    for shift, column, colour, label in zip(
        (-0.2, 0.2), columns, (USUAL, OURS), ("usual", "here"), strict=True
    ):
        heights = [value if isinstance(value, float) else 0 for value in _column(cells, column)]
        axes.bar(places + shift, heights, 0.4, color=colour, label=label)
    for place, (usual, ours) in enumerate(
        zip(_column(cells, columns[0]), _column(cells, columns[1]), strict=True)
    ):
        fits = isinstance(usual, float)
        text = f"{usual / ours:.0f}x" if fits else "usual:\ndoes not\nfit"
        axes.annotate(text, (place, usual if fits else ours), ha="center", va="bottom", fontsize=8)
    axes.set_yscale("log")
    axes.set_xticks(places, [str(count) for count in cells])
    axes.set(xlabel="classes C", ylabel=unit)
    axes.margins(y=0.25)


def _column(cells: dict[int, dict[str, Any]], name: str) -> list[Any]:
    return [cell.get(name) for cell in cells.values()]


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw time of the text step, time of the whole step, and memory kept for backward."""
    cells = steps(result)
    figure, (text, whole, memory) = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained")
    bars(text, cells, ("reference s", "ours s"), "seconds")
    text.set_title("text: 77 tokens a class, or shared prefix")
    bars(whole, cells, ("with images s", "ours s"), "seconds")
    whole.set_title("with the image tower, or cached")
    bars(memory, cells, ("reference saved MB", "ours saved MB"), "MB")
    memory.set_title("kept for the backward pass")
    text.legend()
    device = result["environment"]
    figure.suptitle(f"One local step, {MODEL}, batch 32, {device['device']} ({device['date']})")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("image", type=Path)
    options = parser.parse_args()
    draw(json.loads(options.result.read_text().splitlines()[-1]), options.image)
