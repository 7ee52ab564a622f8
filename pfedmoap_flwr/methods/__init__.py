"""What is learned: one file per paper. A method is found by its module's name, no registry."""

import functools
import importlib
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pfedmoap_flwr.methods.base import Method

NOT_METHODS = ("base", "settings")

RIVALS = ("pfedmoap", "promptfl", "coop", "tofa", "gh_ofl", "zeroshot")
"""What a comparison compares where nothing else is said; the last three train nothing."""


@functools.cache
def names() -> tuple[str, ...]:
    """Return the names of all methods there are. No method is imported."""
    found = (m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg)
    return tuple(sorted(name for name in found if name not in NOT_METHODS))


@functools.cache
def load(name: str) -> "type[Method]":
    """Return the one Method class that module `name` defines."""
    from pfedmoap_flwr.methods.base import Method

    module = importlib.import_module(f"{__name__}.{name}")
    (found,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Method)
        and value.__module__ == module.__name__
    )
    return found
