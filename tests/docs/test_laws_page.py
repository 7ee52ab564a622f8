"""docs/laws.md lists all laws, each with tests that bear its number."""

import re

from support import ROOT


def test_the_page_lists_every_law_with_its_tests() -> None:
    page = (ROOT / "docs" / "laws.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.+) \| (.+) \|$", page, flags=re.MULTILINE)
    assert [int(number) for number, _, _ in rows] == list(range(1, 17))
    for number, _, tests in rows:
        named = re.findall(r"::(test_\w+)`", tests)
        assert named
        assert all(name.startswith(f"test_{number}_") for name in named)


def test_every_law_that_is_tested_has_a_number_of_the_page() -> None:
    for path in (ROOT / "tests" / "laws").glob("test_law*.py"):
        found = re.findall(r"^def test_(\d*)", path.read_text(), flags=re.MULTILINE)
        assert all(number and 1 <= int(number) <= 16 for number in found), path.name
