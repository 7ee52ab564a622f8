"""What can be told from what: paired differences, Friedman's test, Nemenyi's critical difference.

After Demšar, "Statistical Comparisons of Classifiers over Multiple Data Sets" (JMLR 7, 2006).
"""

import math
from dataclasses import dataclass

import pandas as pd
from scipy import stats

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and its t interval over n values; without one (n < 2) both ends are NaN."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def verdict(self) -> str:
        """Whether the mean can be told from 0: "yes", "no", or "unknown" where n < 2."""
        if math.isnan(self.low):
            return "unknown"
        return "no" if self.low <= 0 <= self.high else "yes"


def interval(values: pd.Series) -> Interval:
    """Return the mean and its interval at 95 % by Student's t."""
    n, mean = len(values), float(values.mean()) if len(values) else math.nan
    if n < 2:
        return Interval(mean, math.nan, math.nan, n)
    error = float(stats.sem(values))
    if not error:
        return Interval(mean, mean, mean, n)
    low, high = stats.t.interval(LEVEL, n - 1, loc=mean, scale=error)
    return Interval(mean, float(low), float(high), n)


@dataclass(frozen=True)
class Difference:
    """The best less another one: by seed, by client of each seed, and for how many clients.

    better, worse, equal: clients for whom the other one is so.
    """

    by_seed: Interval
    by_client: Interval
    better: int
    worse: int
    equal: int


def difference(
    best: str, other: str, metric: str, runs: pd.DataFrame, clients: pd.DataFrame
) -> Difference:
    """Compare two labels of one data set on what both have: the same seeds, the same clients.

    Clients are the same where the seed and the digest of the partition are.
    """
    of_run = runs.set_index("seed").groupby("label")[metric]
    by_seed = (of_run.get_group(best) - of_run.get_group(other)).dropna()
    by_client = pd.Series(dtype=float)
    if metric in clients:
        of_client = clients.set_index(["seed", "partition", "client"]).groupby("label")[metric]
        by_client = (of_client.get_group(best) - of_client.get_group(other)).dropna()
    return Difference(
        interval(by_seed),
        interval(by_client),
        better=int((by_client < 0).sum()),
        worse=int((by_client > 0).sum()),
        equal=int((by_client == 0).sum()),
    )


def label_means(runs: pd.DataFrame, metric: str) -> pd.Series:
    """Return the mean of each label that has the metric, in the order of the runs."""
    return runs.groupby("label", sort=False)[metric].mean().dropna()


def best_label(runs: pd.DataFrame, metric: str) -> str | None:
    """Return the label of the highest mean, of one data set's runs; None where none has it."""
    means = label_means(runs, metric)
    return str(means.idxmax()) if len(means) else None


def all_equal(runs: pd.DataFrame, metric: str) -> bool:
    """Return whether all labels have one mean, as with CLIP's own accuracy, up to rounding."""
    means = label_means(runs, metric)
    return bool(means.max() - means.min() < 1e-12)


@dataclass(frozen=True)
class Ranking:
    """Average ranks over blocks, 1 being best; Friedman's statistic (of ties corrected) and p.

    critical: the difference of average ranks from which on Nemenyi's test tells two apart.
    """

    ranks: pd.Series
    blocks: pd.DataFrame
    statistic: float
    p: float
    critical: float


def ranking(blocks: pd.DataFrame, alpha: float = 0.05) -> Ranking | None:
    """Rank labels (columns) in every block (row) that has them all; more is better.

    None where fewer than three labels or two blocks are there, which Friedman's test needs.
    """
    whole = blocks.dropna()
    count, labels = whole.shape
    if count < 2 or labels < 3:
        return None
    ranks = whole.rank(axis=1, ascending=False).mean().sort_values(kind="stable")
    if (whole.nunique(axis=1) == 1).all():
        statistic, p = 0.0, 1.0  # all alike: scipy divides by 0
    else:
        statistic, p = stats.friedmanchisquare(*(whole[label] for label in whole))
    quantile = stats.studentized_range.ppf(1 - alpha, labels, math.inf) / math.sqrt(2)
    critical = quantile * math.sqrt(labels * (labels + 1) / (6 * count))
    return Ranking(ranks, whole, float(statistic), float(p), float(critical))
