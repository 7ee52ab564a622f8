"""Every file of conf/ is a set of settings that exist."""

import tomllib
from pathlib import Path

import pytest
from test_settings import flatten

from pfedmoap_flwr import config, methods

CONF = sorted((Path(__file__).parent.parent / "conf").glob("*.toml"))


@pytest.mark.parametrize("path", CONF, ids=lambda path: path.stem)
def test_a_conf_file_is_valid(path: Path) -> None:
    config.parse(flatten(tomllib.loads(path.read_text())))


def test_every_method_has_one_and_a_page() -> None:
    docs = CONF[0].parent.parent / "docs" / "methods"
    assert set(methods.names()) <= {path.stem for path in CONF}
    assert set(methods.names()) == {path.stem for path in docs.glob("*.md")}
