"""pfedmoap predict, pfedmoap export: a client's personal model, used and taken along."""

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from pfedmoap_flwr import files
from pfedmoap_flwr.cli.say import say
from pfedmoap_flwr.data.sources.folder import SUFFIXES
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.runs.find_model import find_model
from pfedmoap_flwr.runs.model import Model
from pfedmoap_flwr.spreadsheet import csv_text, harmless

BEST = 3
"""Classes shown of an image."""


def predict_images(
    place: Path,
    images: Sequence[Path],
    client: int | None,
    table: Path | None,
    weights: str,
    console: Console,
    *,
    best: bool = False,
) -> None:
    """Print the likeliest classes of each image; write all probabilities where a file is named."""
    if table:
        _check_target("--csv", table, (".csv",))
    paths = _images(images)
    model = find_model(place, client, weights, best=best)
    found = model.probabilities(paths)
    console.print(_shown(model, paths, found))
    said = model.meaning
    say(console, f"{said.method_name}, client {said.client}, after round {said.round}")
    if table:
        _write("--csv", table, _csv(model, paths, found).encode())
        say(console, f"probabilities in {table}")


def export_model(
    place: Path, file: Path, client: int | None, console: Console, *, best: bool = False
) -> None:
    """Write a client's personal model, and say what it is."""
    _check_target("FILE", file, (".safetensors",))
    if file.exists():
        raise UsageError(f"{file}: is there already; give another file")
    model = find_model(place, client, best=best)
    try:
        model.save(file)
    except OSError as error:
        raise UsageError(f"{file}: cannot be written ({error.strerror})") from error
    said = model.meaning
    lent = "" if said.owners is None else f", experts of clients {', '.join(map(str, said.owners))}"
    say(
        console,
        f"{said.method_name}, client {said.client}, after round {said.round}, "
        f"{len(said.classnames)} classes{lent}: {file}, {file.stat().st_size:,} bytes",
    )


def _images(given: Sequence[Path]) -> list[Path]:
    """Return the images that are named, and those of folders that are, in order of their names."""
    found: list[Path] = []
    for path in given:
        if not path.exists():
            raise UsageError(f"{path}: there is no such image")
        inside = (
            sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
            if path.is_dir()
            else []
        )
        if path.is_dir() and not inside:
            raise UsageError(f"{path}: there is no image in this folder")
        found += inside or [path]
    return found


def _shown(model: Model, paths: Sequence[Path], found: Tensor) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    # The name alone leaves room for classes; the CSV has the whole path
    table.add_column("image", no_wrap=True, max_width=24)
    for _ in range(best := min(BEST, len(model.classnames))):
        table.add_column("class", overflow="fold")
        table.add_column("p", justify="right")
    for path, row in zip(paths, found, strict=True):
        values, classes = row.topk(best)
        cells = [
            cell
            for p, i in zip(values.tolist(), classes.tolist(), strict=True)
            for cell in (model.classnames[i], f"{p:.3f}")
        ]
        table.add_row(*(escape(cell) for cell in (path.name, *cells)))
    return table


def _csv(model: Model, paths: Sequence[Path], found: Tensor) -> str:
    rows = []
    for path, row in zip(paths, found.tolist(), strict=True):
        best = max(range(len(row)), key=row.__getitem__)
        rows.append([str(path), model.classnames[best], row[best], *row])
    # As in the column of predictions, so that one finds the other
    probabilities = (f"p({harmless(name)})" for name in model.classnames)
    return csv_text(["image", "predicted", "probability", *probabilities], rows)


def _check_target(what: str, path: Path, suffixes: tuple[str, ...]) -> None:
    if path.suffix.lower() not in suffixes:
        raise UsageError(f"{what} {path}: must end with {' or '.join(suffixes)}")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{what} {path}: there is no folder {path.absolute().parent}")


def _write(what: str, path: Path, content: bytes) -> None:
    try:
        files.replace(path, content)
    except OSError as error:
        raise UsageError(f"{what} {path}: cannot be written ({error.strerror})") from error
