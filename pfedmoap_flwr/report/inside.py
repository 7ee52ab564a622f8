"""The picture of `pfedmoap inspect`: attention, distances in the pool, text features in a plane."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.report.gates import GateView
from pfedmoap_flwr.runs.find_model import RunModels
from pfedmoap_flwr.runs.insight import text_features

Projection = Literal["pca", "t-sne"]
MOST_POINTS = 5000
"""Text features in a picture: more can be told apart by nobody, and t-SNE takes minutes."""
NAMED = 20
"""Classes that still get their name in the plane."""


def pool_distances(models: RunModels) -> list[tuple[int, float]]:
    """Return (round, distance): the root of the mean squared distance of two prompts in the pool.

    Empty for a method that has no pool.
    """
    return [
        (record.round, record.metrics["pool-distance"])
        for record in models.rounds
        if "pool-distance" in record.metrics
    ]


def in_a_plane(features: np.ndarray, projection: Projection) -> np.ndarray:
    """Return features (n, d) in two dimensions (n, 2), by scikit-learn.

    Raises UsageError where scikit-learn is not installed.
    """
    try:
        from sklearn.decomposition import PCA
        from sklearn.manifold import TSNE
    except ImportError:
        raise UsageError(
            "text features are drawn by scikit-learn: pip install 'pfedmoap-flwr[inspect]'"
        ) from None
    if projection == "pca" or len(features) < 4:
        found = PCA(n_components=min(2, *features.shape), random_state=0).fit_transform(features)
        return np.pad(found, ((0, 0), (0, 2 - found.shape[1])))
    neighbours = min(30.0, (len(features) - 1) / 3)
    plane: np.ndarray = TSNE(
        perplexity=neighbours, metric="cosine", init="random", random_state=0
    ).fit_transform(features)
    return plane


def draw_inside(
    models: RunModels,
    client_ids: Sequence[int],
    views: Sequence[GateView],
    projection: Projection,
    path: Path,
) -> None:
    """Draw what there is of the three; the suffix decides between PNG and SVG.

    Raises UsageError where there is nothing to draw, or it cannot be written.
    """
    panels: list[Callable[[Any], None]] = []
    if len(views) == 1:
        panels.append(lambda axes: _by_class(axes, views[0], models.method.task.classnames))
    elif views:
        panels.append(lambda axes: _by_owner(axes, views))
    if distances := pool_distances(models):
        panels.append(lambda axes: _over_rounds(axes, distances))
    features = {i: text_features(models.of(i)) for i in client_ids}
    known = {i: f.double().cpu().numpy() for i, f in features.items() if f is not None}
    if known:
        plane = _plane(known, projection)
        panels.append(lambda axes: _scatter(axes, plane, models.method.task.classnames, projection))
    if not panels:
        raise UsageError(f"--figure {path}: {models.settings.method} has nothing to draw")
    # Half a second that no other command needs
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(panels), 5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        panel(axes)
    figure.suptitle(models.folder.name, fontsize=10, parse_math=False)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise UsageError(f"--figure {path}: cannot be written ({error.strerror})") from error


def _plane(known: dict[int, np.ndarray], projection: Projection) -> dict[int, np.ndarray]:
    """Return each client's features in the plane that all of them share."""
    first = next(iter(known.values()))
    shown = dict(list(known.items())[: max(1, MOST_POINTS // len(first))])
    plane = in_a_plane(np.concatenate(list(shown.values())), projection)
    return dict(zip(shown, np.split(plane, len(shown)), strict=True))


def _by_owner(axes: Any, views: Sequence[GateView]) -> None:
    """Draw who (row) listens to whom (column); experts of unknown owners by their rank."""
    names = [f"client {view.client_id}" for view in views]
    shares = [
        dict(zip((name, *view.owners[1:]), view.shares, strict=True))
        for name, view in zip(names, views, strict=True)
    ]
    columns = sorted({owner for row in shares for owner in row}, key=_number)
    grid = np.array([[row.get(owner, np.nan) for owner in columns] for row in shares])
    _heat(axes, grid, names, columns, "whose prompt", "attention by owner")


def _by_class(axes: Any, view: GateView, classnames: Sequence[str]) -> None:
    grid = np.array(view.by_class)
    _heat(axes, grid, view.owners, classnames, "class", f"attention of client {view.client_id}")


def _heat(
    axes: Any,
    grid: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    label: str,
    title: str,
) -> None:
    shown = axes.imshow(np.ma.masked_invalid(grid), aspect="auto", cmap="viridis_r")
    # A class name may hold a $, which is no formula
    style: dict[str, Any] = {"fontsize": 6, "parse_math": False}
    axes.set_xticks(range(len(columns)), labels=columns, rotation=90, **style)
    axes.set_yticks(range(len(rows)), labels=rows, **style)
    axes.set_xlabel(label)
    axes.set_title(title, fontsize=9)
    axes.figure.colorbar(shown, ax=axes, label="share of attention")


def _over_rounds(axes: Any, distances: Sequence[tuple[int, float]]) -> None:
    rounds, values = zip(*distances, strict=True)
    axes.plot(rounds, values, marker="o")
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("round")
    axes.set_ylabel("distance of two prompts (root mean square)")
    axes.set_title("prompts in the pool", fontsize=9)


def _scatter(
    axes: Any, plane: dict[int, np.ndarray], classnames: Sequence[str], projection: Projection
) -> None:
    """Draw a point for each client and class, its colour the class."""
    colours = [f"C{i % 10}" for i in range(len(classnames))]
    for points in plane.values():
        axes.scatter(points[:, 0], points[:, 1], s=12, c=colours, alpha=0.7, linewidths=0)
    if len(classnames) <= NAMED:
        middle = np.mean(list(plane.values()), axis=0)
        for name, (x, y), colour in zip(classnames, middle, colours, strict=True):
            axes.annotate(name, (x, y), fontsize=6, color=colour, parse_math=False)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(
        f"text features of {len(plane)} client{'s' * (len(plane) > 1)}, {projection.upper()}",
        fontsize=9,
    )


def _number(owner: str) -> tuple[int, str]:
    digits = owner.rpartition(" ")[2]
    return (int(digits) if digits.isdecimal() else -1, owner)
