"""Tables of data sets and of who holds what."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pfedmoap_flwr.data import SPLITS
from pfedmoap_flwr.data.catalogue import Source
from pfedmoap_flwr.data.images import ImageData
from pfedmoap_flwr.data.partition import ClientRows, class_counts

LARGEST = 3  # classes named where there is no room for all
UNBOUNDED = 10_000  # columns


@dataclass(frozen=True)
class Entry:
    """One data set with its extent (0: not known) and where it is."""

    source: Source
    classes: int
    domains: int
    images: int
    place: str


def print_catalogue(entries: Sequence[Entry], console: Console) -> None:
    """Print a row per data set, and below them the words that no column of a terminal holds."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("data.name", no_wrap=True)
    for name in ("classes", "domains", "images"):
        table.add_column(name, justify="right")
    table.add_column("here", no_wrap=True)
    table.add_column("licence", no_wrap=True)
    for entry in entries:
        numbers = (entry.classes, entry.domains, entry.images)
        cells = [f"{number:,}" if number else "-" for number in numbers]
        table.add_row(entry.source.name, *cells, entry.place, entry.source.licence)
    console.print(table)
    for entry in entries:
        if entry.source.hub:
            line = f"{entry.source.name}: hub {entry.source.hub}"
            console.print(line, soft_wrap=True, highlight=False, markup=False)


def print_partition(
    images: ImageData, clients: Sequence[ClientRows], title: str, console: Console
) -> None:
    """Print a row per client: training images of each class, or of the largest where room is short.

    All of its images in each split follow.
    """
    counts = class_counts(images, clients, "train")
    headers = [escape(name) for name in images.classnames]
    rows = [[str(count) if count else "." for count in of_client] for of_client in counts]
    table = _table(title, headers, rows, clients)
    if narrowest(table, console) > console.width:
        rows = [_largest(of_client, images.classnames) for of_client in counts]
        table = _table(title, ["classes", "largest"], rows, clients)
    console.print(table)


def _table(
    title: str, headers: Sequence[str], rows: list[list[str]], clients: Sequence[ClientRows]
) -> Table:
    table = Table(title=f"training images by class, all by split: {title}")
    table.add_column("client", justify="right")
    table.add_column("domain")
    for name in headers:
        table.add_column(name, justify="left" if name == "largest" else "right")
    for name in SPLITS:
        table.add_column(name, justify="right", no_wrap=True)
    for client, cells in zip(clients, rows, strict=True):
        totals = [str(len(client.rows[split])) for split in SPLITS]
        table.add_row(str(client.client_id), escape(client.domain) or "-", *cells, *totals)
    return table


def narrowest(table: Table, console: Console) -> int:
    """Return the width that a table needs so that no word is broken, however wide the console."""
    return console.measure(table, options=console.options.update(max_width=UNBOUNDED)).minimum


def _largest(counts: np.ndarray, classnames: Sequence[str]) -> list[str]:
    """Return how many classes a client has, and those with the largest shares."""
    order = np.argsort(-counts, kind="stable")[:LARGEST]
    shares = [f"{escape(classnames[c])} {counts[c] / counts.sum():.0%}" for c in order if counts[c]]
    return [str(np.count_nonzero(counts)), ", ".join(shares)]
