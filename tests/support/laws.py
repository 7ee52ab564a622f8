"""What the laws have in common: they hold for every method, one that is added tomorrow included."""

import pytest

from pfedmoap_flwr import methods

QUICK = "pfedmoap"
"""The method whose laws `make test-quick` checks; it has something of everything."""

every_method = pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=[] if name == QUICK else pytest.mark.slow)
        for name in methods.names()
    ],
)
