"""What the pages name exists: links, tests, code, settings with their defaults, fidelity."""

import re
from pathlib import Path

import pytest

from pfedmoap_flwr import config, methods

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/**/*.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@every_page
def test_tests_that_are_named_exist(page: Path) -> None:
    for file, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page.read_text()):
        assert (ROOT / file).is_file(), file
        assert not name or f"def {name}(" in (ROOT / file).read_text(), name


@every_page
def test_code_that_is_named_exists(page: Path) -> None:
    rooms = "|".join(path.name for path in (ROOT / "pfedmoap_flwr").iterdir() if path.is_dir())
    named = re.findall(rf"`((?:{rooms})/[\w/]+\.py)`(?:, `([\w.]+)`)?", page.read_text())
    for file, names in named:
        source = (ROOT / "pfedmoap_flwr" / file).read_text()
        for name in filter(None, names.split(".")):
            assert re.search(rf"^ *((class|def) {name}\b|{name}\b.* = )", source, re.MULTILINE), (
                name
            )


@every_page
def test_defaults_of_settings_are_the_programs(page: Path) -> None:
    known = {key: field.default for key, field in config.known_fields(methods.names()).items()}
    tables = re.findall(r"^\| key \| default .*\n.*\n((?:\|.*\n)+)", page.read_text(), re.MULTILINE)
    for row in "".join(tables).splitlines():
        cells = row.replace("`", "").split("|")
        keys, defaults = (cell.strip().split(", ") for cell in cells[1:3])
        said = [f"{key}={default}" for key, default in zip(keys, defaults, strict=True)]
        assert config.parse_words(said) == {key: known[key] for key in keys}


@pytest.mark.parametrize("method", methods.names())
def test_every_method_has_a_page_that_says_how_faithful_it_is(method: str) -> None:
    page = (ROOT / "docs" / "methods" / f"{method}.md").read_text()
    fidelity = methods.load(method).fidelity.partition(":")[0]
    assert re.search(rf"^\*\*Fidelity: \*{fidelity}", page, flags=re.MULTILINE)
    own = config.known_fields([method]).keys() - config.known_fields([]).keys()
    assert all(f"| `{key}` |" in page for key in own)
