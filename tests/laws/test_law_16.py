"""Law 16: each method has a file of numbers that do not come from this program."""

from support import ROOT
from support.laws import every_method


@every_method
def test_16_every_method_is_checked_against_other_numbers(method: str) -> None:
    tests = ROOT / "tests" / "paper" / f"test_{method}.py"
    assert tests.is_file()
    assert "\ndef test_" in tests.read_text()
