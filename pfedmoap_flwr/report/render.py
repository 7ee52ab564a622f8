"""A report as a terminal shows it, as Markdown, CSV, LaTeX, or one HTML page."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from pfedmoap_flwr import files
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.report.document import Cell, Report, Table
from pfedmoap_flwr.runs.place import make_folder
from pfedmoap_flwr.spreadsheet import csv_text, one_line

Format = Literal["terminal", "md", "csv", "latex", "html"]
FORMATS: tuple[Format, ...] = get_args(Format)
SUFFIXES = {"md": "md", "latex": "tex", "html": "html"}
TEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "≈": r"$\approx$",
    "χ²": r"$\chi^2$",
}
MARKDOWN = {
    **{sign: f"\\{sign}" for sign in ("\\", "|", "*", "_", "`", "~", "](")},
    "&": "&amp;",
    "<": "&lt;",
    ">": "&gt;",
}


def print_report(report: Report, console: Console) -> None:
    """Print all tables that are not long, and what is said beside them."""
    for table in report.tables:
        if table.long:
            continue
        shown = RichTable(
            title=Text(table.title), box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
        )
        for column in table.columns:
            justify: Literal["left", "right"] = "right" if column.parts else "left"
            shown.add_column(Text(column.title), justify=justify, overflow="fold")
        for row in table.rows:
            shown.add_row(*(_styled(cell) for cell in row))
        console.print(shown)
        for note in table.notes:
            console.print(note, highlight=False, markup=False)
    for note in report.notes:
        console.print(note, highlight=False, markup=False)


def _styled(cell: Cell) -> Text:
    said = f"{cell.text} ≈" if cell.mark == "same" else cell.text
    return Text(said, style="bold" if cell.mark == "best" else "")


def rendered(report: Report, form: Literal["md", "latex", "html"]) -> str:
    """Return the whole report in one text."""
    environment = Environment(
        loader=PackageLoader("pfedmoap_flwr.report"),
        autoescape=lambda name: name == "report.html",
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"md": _escaper(MARKDOWN), "tex": _escaper(TEX), "json": _in_script}
    template = environment.get_template(f"report.{SUFFIXES[form]}")
    return template.render(report=report)


def as_csv(table: Table) -> str:
    """Return a table's numbers, unrounded, a column for each part; no text is a formula."""
    headings = [heading for column in table.columns for heading in column.headings]
    rows = []
    for row in table.rows:
        cells: list[object] = []
        for column, cell in zip(table.columns, row, strict=True):
            cells += [*cell.numbers] if column.parts and cell.numbers else [cell.text]
        rows.append(cells)
    return csv_text(headings, rows)


def printed(report: Report, form: Format) -> str:
    """Return what goes to standard output: all of it, of CSV the first table alone."""
    if form == "csv":
        return as_csv(report.tables[0])
    if form == "terminal":
        raise ValueError("a terminal's tables are printed")
    return rendered(report, form)


def write(report: Report, form: Format, folder: Path) -> list[Path]:
    """Write the report into a folder, which is made; CSV is a file for each table.

    Raises UsageError where it cannot be written.
    """
    make_folder("--out", folder)
    if form == "csv":
        said = {f"{table.name}.csv": as_csv(table) for table in report.tables}
    else:
        text = printed(report, form)
        said = {f"report.{SUFFIXES[form]}": text}
    if form != "html" and report.diagram:
        said["critical-difference.svg"] = report.diagram
    for name, text in said.items():
        try:
            files.replace(folder / name, text)
        except OSError as error:
            raise UsageError(f"--out {folder / name}: cannot be written ({error})") from error
    return [folder / name for name in said]


def _escaper(signs: dict[str, str]) -> Callable[[object], str]:
    pattern = re.compile("|".join(map(re.escape, signs)))

    def escape(said: object) -> str:
        return pattern.sub(lambda found: signs[found[0]], one_line(str(said)))

    return escape


def _in_script(said: object) -> Markup:
    """Return JSON for a script element: no "<", with which it could end."""
    text = json.dumps(said, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
