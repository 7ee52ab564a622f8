"""Numbers that change with epochs or rounds."""

import math


def cosine(start: float, done: int, of: int) -> float:
    """Return what falls from `start` to 0 in a cosine: start / 2 (1 + cos(pi done / of))."""
    return start * (1 + math.cos(math.pi * done / of)) / 2
