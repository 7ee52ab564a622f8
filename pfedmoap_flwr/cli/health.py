"""pfedmoap health: one line on a run, and an exit code for an alarm."""

from pathlib import Path

from pfedmoap_flwr.runs.health import health


def print_health(run: Path, max_age: float | None) -> int:
    """Print the line; return 0 where nobody need be called, else 1."""
    found = health(run, max_age)
    print(found.line())
    return 0 if found.is_good else 1
