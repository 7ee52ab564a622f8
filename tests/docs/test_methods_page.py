"""The page of all methods says what the methods of today send and keep."""

import importlib.util
from collections.abc import Iterator

import pytest

from support import ROOT
from support.federation import forget_data


@pytest.fixture(autouse=True)
def _embedded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The embedded data and CLIP, whose numbers the page has."""
    forget_data()
    monkeypatch.delenv("PFEDMOAP_ASSETS")
    yield
    forget_data()


def test_the_page_is_what_the_script_writes() -> None:
    spec = importlib.util.spec_from_file_location("page", ROOT / "scripts" / "methods_page.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text() == script.page(script.rows())
