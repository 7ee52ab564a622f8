"""Tables as CSV, whoever wrote their cells: no text is a formula or a line of its own."""

import csv
import io
import re
from collections.abc import Iterable
from typing import Any

FORMULAS = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""What a spreadsheet may run begins with one of these; the last four are full-width forms."""


def csv_text(headings: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Return a table as CSV; each text in it is harmless, headings included."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    for row in (headings, *rows):
        writer.writerow([harmless(cell) for cell in row])
    return text.getvalue()


def harmless(cell: Any) -> Any:
    """Return a text that a spreadsheet does not run as a formula, in one line; a number as it is.

    A node names its domain, so the text may be anything.
    """
    if not isinstance(cell, str):
        return cell
    text = one_line(cell)
    return f"'{text}" if text.lstrip().startswith(FORMULAS) else text


def one_line(text: str) -> str:
    """Return a text with a space for each character that ends a line or steers a terminal."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", " ", text)
