"""Where a run computes: in this process, or in processes that Flower starts."""

from typing import Literal

Engine = Literal["in-process", "ray"]
