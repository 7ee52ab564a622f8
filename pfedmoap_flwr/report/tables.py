"""Terminal tables."""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

ACCURACIES = {
    "personal_accuracy": "personal accuracy",
    "global_accuracy": "global accuracy",
    "zeroshot_accuracy": "zero-shot accuracy",
    "worst_client_accuracy": "worst client",
}


def print_summary(summary: Mapping[str, Any], console: Console) -> None:
    """Print one run's closing table."""
    title = "{method} on {dataset}, seed {seed}, {rounds} rounds, {clients} clients".format(
        **summary
    )
    table = Table(title=title, show_header=False)
    for key, name in ACCURACIES.items():
        # No client has test images: there is no accuracy
        table.add_row(name, "-" if summary[key] is None else f"{summary[key]:.1%}")
    table.add_row("bytes per client and round", traffic(summary))
    table.add_row("failures", str(summary["failures"]))
    table.add_row("seconds", f"{summary['seconds']:.0f}")
    console.print(table)


def print_comparison(
    summaries: Mapping[str, Sequence[Mapping[str, Any]]], console: Console
) -> None:
    """Print one row per method: mean and standard deviation over its seeds."""
    table = Table(title=f"mean ± standard deviation over {_seeds(summaries)} seeds")
    table.add_column("method")
    for name in ACCURACIES.values():
        table.add_column(name, justify="right")
    table.add_column("bytes per client and round", justify="right")
    for method, runs in summaries.items():
        cells = [spread([r[key] for r in runs if r[key] is not None]) for key in ACCURACIES]
        table.add_row(method, *cells, traffic(runs[0]))
    console.print(table)


def spread(values: Sequence[float]) -> str:
    """Return "61.2 ± 0.4" in percent, "-" for none; the standard deviation is the sample's."""
    if not values:
        return "-"
    mean = f"{100 * fmean(values):.1f}"
    return f"{mean} ± {100 * stdev(values):.1f}" if len(values) > 1 else mean


def traffic(summary: Mapping[str, Any]) -> str:
    """Return the mean bytes of one participation, down and up."""
    count = max(1, summary["participations"])
    down, up = (round(summary[key] / count) for key in ("bytes_down", "bytes_up"))
    return f"{down:,} down, {up:,} up"


def megabytes(size: float) -> str:
    """Return a number of bytes as "13.5 MB", or "8.2 GB"."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _seeds(summaries: Mapping[str, Sequence[Mapping[str, Any]]]) -> int:
    return min(len(runs) for runs in summaries.values())
