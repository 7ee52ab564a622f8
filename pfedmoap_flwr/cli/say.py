"""A line for people, as it is."""

from rich.console import Console


def say(console: Console, text: str) -> None:
    """Print a line: what looks like markup is text, and a pipe gets it unbroken."""
    console.print(text, highlight=False, soft_wrap=True, markup=False)
