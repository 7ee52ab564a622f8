"""pfedmoap inspect: what a run's clients have learned."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import get_args

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pfedmoap_flwr.cli.say import say
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.report import figures
from pfedmoap_flwr.report.gates import GateView, gates_of, has_gates
from pfedmoap_flwr.report.inside import Projection, draw_inside, pool_distances
from pfedmoap_flwr.runs.find_model import RunModels
from pfedmoap_flwr.runs.insight import near_words

WORDS = 5
CLASSES = 3
"""Words near a token, and classes of an expert, that are shown."""


def print_inside(
    folder: Path,
    client_ids: Sequence[int],
    figure: Path | None,
    projection: str,
    console: Console,
    *,
    best: bool = False,
) -> None:
    """Print gates and distances of all clients, and of those asked for words and classes besides.

    best: as the best validated round left them. Draws what can be drawn where a file is named.
    """
    if projection not in get_args(Projection):
        raise UsageError(f"--projection {projection}: must be {' or '.join(get_args(Projection))}")
    if figure:
        figures.check_target(figure)
    models = RunModels(folder, best=best)
    if strangers := sorted(set(client_ids) - set(models.clients)):
        raise UsageError(f"--client {strangers[0]}: this run has clients 0 to {models.clients[-1]}")
    views = gates_of(models, client_ids) if has_gates(models) else []
    if views:
        _print_gates(views, console)
    if distances := pool_distances(models):
        shown = ", ".join(f"{number}: {value:.3g}" for number, value in distances)
        say(console, f"distance of two prompts in the pool, by round: {shown}")
    for client_id in client_ids:
        for view in (v for v in views if v.client_id == client_id):
            console.print(_by_class(view, models.method.task.classnames))
        console.print(_words(models, client_id))
    if not client_ids:
        say(console, "--client NUMBER shows attention by class, and the words near its prompt")
    if figure:
        wanted = client_ids or models.clients
        draw_inside(models, wanted, views, projection, figure)  # type: ignore[arg-type]
        say(console, f"figure in {figure}")


def _print_gates(views: Sequence[GateView], console: Console) -> None:
    console.print(_gates(views))
    mean = fmean(view.shares[0] for view in views)
    flat = fmean(1 / len(view.shares) for view in views)
    say(
        console,
        f"own prompt: {mean:.3f} of the attention, {flat:.3f} would be flat; entropy "
        f"{fmean(view.entropy for view in views):.3f} of a flat gate's",
    )


def _gates(views: Sequence[GateView]) -> Table:
    table = _table("client", "own", "experts", "largest", "of", "entropy", "cosine")
    for view in views:
        borrowed = view.shares[1:]
        most = max(range(len(borrowed)), key=borrowed.__getitem__)
        table.add_row(
            str(view.client_id),
            f"{view.shares[0]:.3f}",
            str(len(borrowed)),
            f"{borrowed[most]:.3f}",
            view.owners[1 + most],
            f"{view.entropy:.3f}",
            f"{view.cosine:.3f}",
        )
    return table


def _by_class(view: GateView, classnames: Sequence[str]) -> Table:
    """Return a row per expert: its share, and the classes whose attention it gets most of."""
    table = _table(f"client {view.client_id} listens to", "share")
    table.add_column("most for the classes", overflow="fold")
    for owner, share, row in zip(view.owners, view.shares, view.by_class, strict=True):
        best = sorted(range(len(row)), key=lambda c: -row[c])[:CLASSES]
        said = ", ".join(f"{classnames[c]} {row[c]:.3f}" for c in best)
        table.add_row(owner, f"{share:.3f}", escape(said))
    return table


def _words(models: RunModels, client_id: int) -> Table:
    table = _table(f"prompt of client {client_id}", "token")
    table.add_column("nearest words, and their distances", overflow="fold")
    rows: dict[tuple[str, int], list[str]] = {}
    for near in near_words(models.of(client_id), WORDS):
        name = f"{near.prompt} {near.part}".rstrip()
        rows.setdefault((name, near.token), []).append(f"{near.word} {near.distance:.2f}")
    for (name, token), words in rows.items():
        table.add_row(escape(name), str(token), escape(", ".join(words)))
    return table


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="right")
    return table
