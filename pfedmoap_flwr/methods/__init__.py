"""What is learned: one file per paper. A method is found by its module's name, no registry."""

import functools
import importlib
import pkgutil

from pfedmoap_flwr.methods.base import Head, Method, Received, Server, Task, Upload

__all__ = ["Head", "Method", "Received", "Server", "Task", "Upload", "load", "names"]


@functools.cache
def names() -> tuple[str, ...]:
    """Return the names of all methods there are."""
    return tuple(
        sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "base" and not m.ispkg)
    )


@functools.cache
def load(name: str) -> type[Method]:
    """Return the one Method class that module `name` defines."""
    module = importlib.import_module(f"{__name__}.{name}")
    (found,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Method)
        and value.__module__ == module.__name__
    )
    return found
