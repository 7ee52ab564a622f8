"""A site's own count of epsilon, over runs, and what it refuses."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pfedmoap_flwr import config
from pfedmoap_flwr.engines.in_process import (
    FIRST_NODE_ID,
    InProcessGrid,
    Workers,
    make_context,
    serve_in_process,
)
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.federation.site_budget import DELTA, SiteBudget
from pfedmoap_flwr.methods.parts.privacy import epsilon_of
from pfedmoap_flwr.runs.folder import RunFolder
from pfedmoap_flwr.settings import Value
from support.federation import make_method
from support.tiny import NUM_CLIENTS, TINY

CAREFUL = 1
PRIVATE: dict[str, Any] = {
    "privacy.unit": "client",
    "privacy.noise": 2.0,
    "privacy.secret-noise": True,
}
Site = Callable[..., RunFolder]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """Run one federation in which one node has a budget; all nodes keep their state folders."""

    def run(name: str, budget: object, **flat: Any) -> RunFolder:
        settings = {**TINY, "method": "promptfl", "local-epochs": 1, **flat}
        settings |= {"run-dir": str(tmp_path / name), "state-dir": str(tmp_path / "state")}
        parsed = config.parse(settings)
        contexts = {}
        for i in range(NUM_CLIENTS):
            node: dict[str, Value] = {"partition-id": i, "num-partitions": NUM_CLIENTS}
            if i == CAREFUL:
                node["privacy-budget"] = budget  # type: ignore[assignment]
            contexts[FIRST_NODE_ID + i] = make_context(FIRST_NODE_ID + i, node, parsed.flat())
        serve_in_process(InProcessGrid(Workers(parsed), contexts), parsed.flat())
        return RunFolder(tmp_path / name)

    return run


def spent(folder: Path) -> float:
    said = json.loads((folder / "state" / f"privacy-client-{CAREFUL}.json").read_text())
    return float(said["mu_squared"])


def test_the_count_goes_on_over_runs_and_what_is_beyond_it_is_refused(
    site: Site, tmp_path: Path
) -> None:
    # Two uploads at z = 2 and one at z = 4: mu^2 = 2 / 4 + 1 / 16
    fits = math.sqrt(2 / 4 + 1 / 16)
    budget = epsilon_of(fits, DELTA) + 1e-6
    first = site("first", budget, **PRIVATE)
    assert not any(record.failed for record in first.rounds())
    assert spent(tmp_path) == pytest.approx(2 / 4)
    second = site("second", budget, **{**PRIVATE, "privacy.noise": 4.0})
    assert [list(record.failed) for record in second.rounds()] == [[], [], [CAREFUL]]
    assert f"privacy-budget={budget:g} for all runs" in second.rounds()[2].failed[CAREFUL]
    assert spent(tmp_path) == pytest.approx(2 / 4 + 1 / 16)
    # The others kept no count, and took part
    assert sorted(second.rounds()[2].bytes_up) == [i for i in range(NUM_CLIENTS) if i != CAREFUL]
    assert len(list((tmp_path / "state").glob("privacy-*.json"))) == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"privacy.unit": "none"}, "without noise of its own"),
        ({"privacy.where": "server"}, "without noise of its own"),
        ({"privacy.secret-noise": False}, "noise that nobody can take off"),
        ({"privacy.noise": 0.0}, "noise that nobody can take off"),
    ],
)
def test_a_run_that_protects_nobody_gets_nothing(
    changes: dict[str, Any], said: str, site: Site, tmp_path: Path
) -> None:
    run = site("run", 1000.0, **{**PRIVATE, **changes, "num-server-rounds": 1})
    assert said in run.rounds()[1].failed[CAREFUL]
    assert CAREFUL not in run.rounds()[1].bytes_up
    assert not list((tmp_path / "state").glob("privacy-*.json"))


@pytest.mark.parametrize("content", ["", "{}", '{"mu_squared": "NaN"}', '{"mu_squared": -1}'])
def test_a_damaged_count_is_not_begun_anew(content: str, tmp_path: Path) -> None:
    budget = SiteBudget(tmp_path / "count.json", 8.0)
    budget.path.write_text(content)
    with pytest.raises(UsageError, match="the count of what this site's uploads have cost"):
        budget.charge(make_method("promptfl", **PRIVATE))
    assert budget.path.read_text() == content


@pytest.mark.parametrize("said", [0, -1, "8", math.inf, math.nan])
def test_a_budget_that_is_none_is_refused(said: object, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="must be a number above 0"):
        SiteBudget.of(said, tmp_path, 0)


def test_an_image_is_counted_in_each_epoch_and_replaced_data_twice_as_far(tmp_path: Path) -> None:
    changes = {"privacy.unit": "example", "privacy.neighbours": "replaced", "local-epochs": 3}
    budget = SiteBudget(tmp_path / "count.json", 1000.0)
    budget.charge(make_method("promptfl", **{**PRIVATE, **changes}))
    assert json.loads(budget.path.read_text())["mu_squared"] == pytest.approx(3 / (2 / 2) ** 2)
