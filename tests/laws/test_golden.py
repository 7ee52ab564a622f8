"""Golden metrics: three short rounds of each method on the embedded data give what they gave.

A change that moves a method's numbers is seen here, whatever it was meant for. `scripts/golden.py`
writes the files.
"""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from support import ROOT
from support.federation import forget_data
from support.laws import every_method

pytestmark = pytest.mark.slow
MODELS = ("personal", "global")


@pytest.fixture(autouse=True)
def _embedded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The embedded data and CLIP in the place of the tests' own."""
    forget_data()
    monkeypatch.delenv("PFEDMOAP_ASSETS")
    yield
    forget_data()


def golden_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden", ROOT / "scripts" / "golden.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@every_method
def test_three_rounds_give_what_they_gave(method: str, tmp_path: Path) -> None:
    script = golden_script()
    expected = json.loads((script.FOLDER / f"{method}.json").read_text())
    found = script.golden(method, tmp_path / "run")
    assert [(r["round"], r["down"], r["up"]) for r in found] == [
        (r["round"], r["down"], r["up"]) for r in expected
    ]
    # Rounding differs between machines, and training magnifies it
    tolerances: dict[str, Any] = {
        "loss": {"rel": 2e-3},
        "personal": {"abs": 0.01},
        "global": {"abs": 0.01},
    }
    for one, other in zip(found, expected, strict=True):
        for name, tolerance in tolerances.items():
            if other[name] is None:
                assert one[name] is None
            else:
                assert one[name] == pytest.approx(other[name], **tolerance)
