"""Pictures of numbers by client: who holds which classes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pfedmoap_flwr.errors import UsageError

SUFFIXES = (".png", ".svg")
LABELLED = 120  # rows or columns that still get a name each


def check_target(path: Path) -> None:
    """Raise UsageError where no figure can be written, before any work is done."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--figure {path}: must end with {' or '.join(SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--figure {path}: there is no folder {path.absolute().parent}")


def draw_partition(
    counts: np.ndarray,
    classnames: Sequence[str],
    clients: Sequence[str],
    title: str,
    path: Path,
) -> None:
    """Draw training images (clients, C) as a heat map; the suffix decides between PNG and SVG."""
    shown = np.ma.masked_equal(counts, 0)
    _draw(shown, clients, classnames, ("class", "training images"), title, path)


def _draw(
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    labels: tuple[str, str],
    title: str,
    path: Path,
) -> None:
    """Draw values (clients, columns); `labels` say what a column and what a colour is."""
    # Half a second that no other command needs; without pyplot there is no display to look for
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width = np.clip(2.5 + 0.16 * len(columns), 5, 18)
    height = np.clip(2.5 + 0.18 * len(rows), 4, 18)
    figure = Figure(figsize=(float(width), float(height)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shown = axes.imshow(values, aspect="auto", cmap="viridis_r", interpolation="nearest")
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.set_xlabel(labels[0])
    axes.set_ylabel("client")
    # A class name may hold a $, which is no formula
    style: dict[str, Any] = {"fontsize": 7, "parse_math": False}
    if len(columns) <= LABELLED:
        axes.set_xticks(range(len(columns)), labels=columns, rotation=90, **style)
    if len(rows) <= LABELLED:
        axes.set_yticks(range(len(rows)), labels=rows, **style)
    figure.colorbar(shown, ax=axes, label=labels[1])
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise UsageError(f"--figure {path}: cannot be written ({error.strerror})") from error
