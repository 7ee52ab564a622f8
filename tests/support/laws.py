"""What the laws have in common: they hold for every method, one that is added tomorrow included."""

import pytest

from pfedmoap_flwr import methods

every_method = pytest.mark.parametrize("method", methods.names())
