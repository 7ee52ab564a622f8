"""What the laws have in common: they hold for every method, one that is added tomorrow included."""

from typing import Any

import pytest

from pfedmoap_flwr import methods

QUICK = "pfedmoap"
"""The method whose laws `make test-quick` checks; it has something of everything."""

SHORT: dict[str, Any] = {"local_epochs": 1, "batch_size": 16}
"""Settings of a short training."""

THREE_ROUNDS: dict[str, Any] = {"num_server_rounds": 3, "fraction_train": 0.75, **SHORT}
"""Settings of the run that laws share: `reference` runs it once for each method.

In each round another client stays out.
"""

every_method = pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=[] if name == QUICK else pytest.mark.slow)
        for name in methods.names()
    ],
)
