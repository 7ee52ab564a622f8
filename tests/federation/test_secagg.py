"""What docs/privacy.md says of Flower's secure aggregation holds for the installed Flower."""

import pytest
from flwr import clientapp
from flwr.client.mod import secaggplus_mod
from flwr.server.workflow import SecAggPlusWorkflow

from pfedmoap_flwr.config import Settings
from pfedmoap_flwr.engines.in_process import InProcessGrid, Workers, make_context


def test_the_workflow_refuses_the_context_of_a_server_app() -> None:
    grid = InProcessGrid(Workers(Settings()), {})
    with pytest.raises(TypeError, match="Expect a LegacyContext"):
        SecAggPlusWorkflow(num_shares=3, reconstruction_threshold=2)(grid, make_context(0, {}, {}))


def test_there_is_no_mod_of_it_for_messages() -> None:
    assert secaggplus_mod.__module__.startswith("flwr.client.mod")
    assert not [name for name in dir(clientapp.mod) if "secagg" in name.lower()]
