"""What is learned: one file per paper. A method is found by its module's name, no registry.

Those of others, files and wheels, stand beside them: see `outside`.
"""

import functools
import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

from pfedmoap_flwr.methods import outside

if TYPE_CHECKING:
    from pfedmoap_flwr.clip.load import FrozenClip
    from pfedmoap_flwr.data.federated import Task
    from pfedmoap_flwr.methods.base import Method
    from pfedmoap_flwr.methods.settings import LearningSettings
    from pfedmoap_flwr.settings import Section

NOT_METHODS = ("base", "outside", "settings")

RIVALS = ("pfedmoap", "promptfl", "coop", "tofa", "gh_ofl", "zeroshot")
"""What a comparison compares where nothing else is said; the last three train nothing."""


def built_in() -> tuple[str, ...]:
    """Return the names of the methods of this package. None is imported."""
    found = (m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg)
    return tuple(sorted(name for name in found if name not in NOT_METHODS))


@functools.cache
def names() -> tuple[str, ...]:
    """Return the names of all methods that this process knows. None is imported."""
    return tuple(sorted({*built_in(), *outside.installed(built_in()), *outside.files()}))


@functools.cache
def load(name: str) -> "type[Method]":
    """Return the Method class of a name.

    Raises UsageError where a method from outside cannot be run.
    """
    if name in built_in():
        module = importlib.import_module(f"{__name__}.{name}")
        return outside.only_method(module, f"method {name}")
    if path := outside.files().get(name):
        return outside.from_file(path)
    return outside.from_entry_point(outside.installed(built_in())[name])


def named(text: str) -> str:
    """Return the name that a word of a command, or of Python's `run`, means: itself, or a file's.

    A file's method is then known to this process and to those it starts.

    Raises UsageError where the file is none, or holds no single method.
    """
    if not outside.is_file_name(text):
        return text
    name = outside.allow(text, names())
    names.cache_clear()
    return name


def make(
    name: str, settings: "LearningSettings", own: "Section", clip: "FrozenClip", task: "Task"
) -> "Method[Any, Any]":
    """Return a method that steps as the settings of `optimizer` and `privacy` say.

    It is the same for server and clients. Raises UsageError where they cannot be followed.
    """
    from pfedmoap_flwr.methods.parts.local_optimizer import check_say, stepping
    from pfedmoap_flwr.methods.parts.private_sgd import check_private, private

    kind = private(stepping(load(name), settings), settings)
    method = kind(settings, own, clip, task)
    check_say(method)
    check_private(method)
    return method
