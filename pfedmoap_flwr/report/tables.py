"""Terminal tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

ACCURACIES = {
    "personal_accuracy": "personal accuracy",
    "global_accuracy": "global accuracy",
    "zeroshot_accuracy": "zero-shot accuracy",
    "worst_client_accuracy": "worst client",
}
OPEN_CLASSES = {
    f"{model}_{part}": f"{model.replace('zeroshot', 'zero-shot')}, {name}"
    for model in ("personal", "global", "zeroshot")
    for part, name in {
        "base_accuracy": "base classes",
        "novel_accuracy": "novel classes",
        "unseen_accuracy": "unseen domain",
        "hm": "HM of both",
        "cm": "CM",
    }.items()
}

NEW_CLIENTS = {
    f"new_{model}_accuracy": f"new clients, {name}"
    for model, name in {
        "personal": "personal after adapting",
        "global": "global",
        "zeroshot": "zero-shot",
    }.items()
}
VALIDATION = {
    f"{model}_validation_accuracy": f"{model}, validation images"
    for model in ("personal", "global")
}


def print_summary(summary: Mapping[str, Any], console: Console) -> None:
    """Print one run's closing table."""
    title = "{method} on {dataset}, seed {seed}, {rounds} rounds, {clients} clients".format(
        **summary
    )
    table = Table(title=title, show_header=False)
    for key, name in (ACCURACIES | _open_classes([summary])).items():
        # No client has test images: there is no accuracy
        table.add_row(name, "-" if summary[key] is None else f"{summary[key]:.1%}")
    table.add_row("bytes per client and round", traffic(summary))
    if "peak_memory" in summary:
        table.add_row("peak memory of a client's process", megabytes(summary["peak_memory"]))
    table.add_row("failures", str(summary["failures"]))
    table.add_row("seconds", f"{summary['seconds']:.0f}")
    console.print(table)


def outcome(summary: Mapping[str, Any]) -> str:
    """Return a run's personal accuracy and time, in short."""
    personal = summary["personal_accuracy"]
    said = "no test images" if personal is None else f"personal {personal:.1%}"
    return f"{said}  {summary['seconds']:.0f} s"


def traffic(summary: Mapping[str, Any]) -> str:
    """Return the mean bytes of one participation, down and up, in words."""
    down, up = (round(size) for size in per_participation(summary).values())
    return f"{down:,} down, {up:,} up"


def per_participation(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return bytes_down and bytes_up of one participation, on average."""
    count = max(1, summary["participations"])
    return {key: summary[key] / count for key in ("bytes_down", "bytes_up")}


def megabytes(size: float) -> str:
    """Return a number of bytes as "13.5 MB", or "8.2 GB"."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _open_classes(summaries: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the accuracies that any run has on what nobody trained, by key.

    Those of validation images stand in for a run's that has measured no others.
    """
    known = OPEN_CLASSES | NEW_CLIENTS
    if all(run["personal_accuracy"] is None for run in summaries):
        known = VALIDATION | known
    for key in (key for run in summaries for key in run if key.startswith("on_")):
        name, _, model = key.removeprefix("on_").removesuffix("_accuracy").rpartition("_")
        known |= {key: f"on {name}, {model.replace('zeroshot', 'zero-shot')}"}
    return {k: name for k, name in known.items() if any(k in run for run in summaries)}
