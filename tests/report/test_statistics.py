"""Tests and intervals against Demšar's worked example, scipy, scikit-posthocs, and by hand."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from pfedmoap_flwr.report.statistics import best_label, difference, interval, ranking

# Demšar 2006, Table 6: AUC of C4.5 and its tuned variants; of "voting" the third is a little better
# than the fourth, which both round to 0.975
DEMSAR = pd.DataFrame(
    [
        (0.763, 0.768, 0.771, 0.798),
        (0.599, 0.591, 0.590, 0.569),
        (0.954, 0.971, 0.968, 0.967),
        (0.628, 0.661, 0.654, 0.657),
        (0.882, 0.888, 0.886, 0.898),
        (0.936, 0.931, 0.916, 0.931),
        (0.661, 0.668, 0.609, 0.685),
        (0.583, 0.583, 0.563, 0.625),
        (0.775, 0.838, 0.866, 0.875),
        (1.000, 1.000, 1.000, 1.000),
        (0.940, 0.962, 0.965, 0.962),
        (0.619, 0.666, 0.614, 0.669),
        (0.972, 0.981, 0.9751, 0.975),
        (0.957, 0.978, 0.946, 0.970),
    ],
    columns=["C4.5", "C4.5+m", "C4.5+cf", "C4.5+m+cf"],
)


def test_demsars_example() -> None:
    found = ranking(DEMSAR)
    assert found is not None
    published = {"C4.5": 3.143, "C4.5+m": 2.000, "C4.5+cf": 2.893, "C4.5+m+cf": 1.964}
    assert found.ranks.to_dict() == pytest.approx(published, abs=5e-4)
    assert found.critical == pytest.approx(1.25, abs=5e-3)
    # The paper's 9.28 leaves out the correction for ties: groups of 2, 2, 4 and 2
    ties = 1 - (3 * (2**3 - 2) + (4**3 - 4)) / (14 * 4 * (4**2 - 1))
    assert found.statistic * ties == pytest.approx(9.28, abs=5e-3)
    assert found.p == pytest.approx(stats.chi2.sf(found.statistic, 3))


def test_the_critical_difference_is_where_nemenyis_p_is_a_twentieth() -> None:
    posthocs = pytest.importorskip("scikit_posthocs")
    found = ranking(DEMSAR)
    assert found is not None
    p_values = posthocs.posthoc_nemenyi_friedman(DEMSAR)
    for one, rank in found.ranks.items():
        for other, another in found.ranks.items():
            assert (p_values.loc[one, other] < 0.05) == (abs(rank - another) > found.critical)


def test_blocks_that_lack_a_method_are_left_out_and_two_methods_have_no_ranking() -> None:
    gap = DEMSAR.copy()
    gap.iloc[0, 0] = math.nan
    found = ranking(gap)
    assert found is not None
    assert len(found.blocks) == 13
    assert ranking(DEMSAR[["C4.5", "C4.5+m"]]) is None
    assert ranking(DEMSAR.iloc[:1]) is None


def test_methods_that_are_all_alike_have_one_rank() -> None:
    found = ranking(pd.DataFrame(np.ones((3, 4)), columns=list("abcd")))
    assert found is not None
    assert (found.p, set(found.ranks)) == (1.0, {2.5})


def test_an_interval_is_scipys() -> None:
    values = pd.Series([0.010, 0.025, 0.031])
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    found = interval(values)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    # By hand: t = 4.3027 of two degrees of freedom
    half = 4.302653 * values.std() / math.sqrt(3)
    assert found.high - found.mean == pytest.approx(half, rel=1e-6)


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([0.01], "unknown"),
        ([], "unknown"),
        ([0.01, 0.01], "yes"),
        ([0.0, 0.0, 0.0], "no"),
        ([0.01, -0.02, 0.03], "no"),
        ([0.010, 0.011, 0.012], "yes"),
    ],
)
def test_what_can_be_told(values: list[float], verdict: str) -> None:
    assert interval(pd.Series(values, dtype=float)).verdict == verdict


def frames(partition: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Method a with seeds 0 to 2, b with 1 to 3; two clients each."""
    clients = [
        {"label": label, "seed": seed, "partition": name, "client": client, "x": value}
        for label, seeds, name, values in (
            ("a", (0, 1, 2), "p", (0.5, 0.7)),
            ("b", (1, 2, 3), partition, (0.6, 0.6)),
        )
        for seed in seeds
        for client, value in enumerate(values)
    ]
    table = pd.DataFrame(clients)
    return table.groupby(["label", "seed"], as_index=False)["x"].mean(), table


def test_only_what_both_have_is_paired() -> None:
    runs, clients = frames("p")
    found = difference("a", "b", "x", runs, clients)
    assert (found.by_seed.n, found.by_client.n) == (2, 4)
    assert found.by_client.mean == pytest.approx(0.0)
    assert (found.better, found.worse, found.equal) == (2, 2, 0)


def test_clients_of_another_partition_are_not_paired() -> None:
    runs, clients = frames("q")
    found = difference("a", "b", "x", runs, clients)
    assert (found.by_seed.n, found.by_client.n) == (2, 0)


def test_the_best_is_the_highest_mean_and_a_metric_that_is_lacking_has_none() -> None:
    runs = pd.DataFrame({"label": ["a", "a", "b"], "x": [0.1, 0.9, 0.6], "y": [math.nan] * 3})
    assert best_label(runs, "x") == "b"
    assert best_label(runs, "y") is None
