"""Tables as CSV: what a text may be, and what stays a number."""

import csv
import io

from pfedmoap_flwr.spreadsheet import csv_text


def test_headings_and_cells_are_no_formulas_and_numbers_stay_whole() -> None:
    text = csv_text(["=class", "value"], [["@x, -y", -0.1], ["a\nb", None], ["", 3]])
    assert text == "'=class,value\r\n\"'@x, -y\",-0.1\r\na b,\r\n,3\r\n"
    assert list(csv.reader(io.StringIO(text)))[1] == ["'@x, -y", "-0.1"]
