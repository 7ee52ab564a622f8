"""The page of all methods says what the methods of today send and keep."""

import pytest

from support.scripts import load_script


@pytest.mark.usefixtures("embedded")
def test_the_page_is_what_the_script_writes() -> None:
    script = load_script("methods_page")
    assert script.PAGE.read_text() == script.page(script.rows())
