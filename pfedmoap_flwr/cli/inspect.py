"""pfedmoap inspect: what the gates of a run do."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from rich import box
from rich.console import Console
from rich.table import Table

from pfedmoap_flwr.report import figures
from pfedmoap_flwr.report.gates import GateView, inspect_gates


def print_gates(
    folder: Path, client_ids: Sequence[int], figure: Path | None, console: Console
) -> None:
    """Print a row per client, and draw who listens to whom where a file is named."""
    if figure:
        figures.check_target(figure)
    views = inspect_gates(folder.resolve(), client_ids)
    console.print(_table(views))
    mean = fmean(view.shares[0] for view in views)
    flat = fmean(1 / len(view.shares) for view in views)
    console.print(
        f"own prompt: {mean:.3f} of the attention, {flat:.3f} would be flat; entropy "
        f"{fmean(view.entropy for view in views):.3f} of a flat gate's",
        highlight=False,
    )
    if figure:
        shares, clients = [v.shares for v in views], [v.client_id for v in views]
        figures.draw_attention(shares, clients, folder.resolve().name, figure)
        console.print(f"figure in {figure}", highlight=False, soft_wrap=True)


def _table(views: Sequence[GateView]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("client", "own", "experts", "largest", "entropy", "cosine"):
        table.add_column(column, justify="right")
    for view in views:
        borrowed = view.shares[1:]
        table.add_row(
            str(view.client_id),
            f"{view.shares[0]:.3f}",
            str(len(borrowed)),
            f"{max(borrowed):.3f}",
            f"{view.entropy:.3f}",
            f"{view.cosine:.3f}",
        )
    return table
