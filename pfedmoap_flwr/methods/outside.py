"""Methods from outside this package: files that the command names, and wheels' entry points.

A run's settings hold a method's name, never a file: so no message can have a node run one. Which
files a process runs is said by whoever started it, in the environment, where what it starts finds
it too. A wheel offers methods as entry points of the group `pfedmoap.methods`.
"""

import functools
import hashlib
import importlib.util
import logging
import os
import re
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from pfedmoap_flwr.errors import UsageError, last_line
from pfedmoap_flwr.settings import path_of

if TYPE_CHECKING:
    from pfedmoap_flwr.methods.base import Method

GROUP = "pfedmoap.methods"
FILES = "PFEDMOAP_METHODS"
"""The variable with the files of this process and those it starts, as PATH has folders."""
NAME = re.compile(r"[a-z][a-z0-9_]*")
# Groups of settings, whose keys begin as those of a method of that name would
TAKEN = ("base", "clip", "data", "eval", "optimizer", "privacy", "prompt", "server", "settings")
logger = logging.getLogger("flwr.pfedmoap")


def is_file_name(text: str) -> bool:
    """Tell whether a word means a file and not a method's name."""
    return text.endswith(".py") or "/" in text or os.sep in text


def files() -> dict[str, Path]:
    """Return the files that this process may run as methods, by name."""
    said = os.environ.get(FILES, "").split(os.pathsep)
    return {Path(text).stem: Path(text) for text in said if text}


@functools.cache
def installed(built_in: tuple[str, ...]) -> dict[str, EntryPoint]:
    """Return the methods of installed wheels, by name, none of which is imported.

    A wheel cannot replace a method that is built in.
    """
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=GROUP):
        if not NAME.fullmatch(point.name) or point.name in (*built_in, *TAKEN, *found):
            logger.warning("entry point %s=%s is left out: name taken or odd", point.name, point)
            continue
        found[point.name] = point
    return found


def allow(text: str, known: tuple[str, ...]) -> str:
    """Let this process, and those it starts, run a file as a method; return the method's name.

    known: names of other methods. Raises UsageError where the file is none, has an impossible
    name, or holds no single method.
    """
    path = path_of("method", text)
    if path.suffix != ".py" or not path.is_file():
        raise UsageError(f"method file {text}: there is no such Python file")
    name, there = path.stem, files()
    if not NAME.fullmatch(name) or name in TAKEN or (name in known and name not in there):
        raise UsageError(
            f"method file {text}: {name!r} cannot be a method's name here; call the file by small "
            "letters, digits and _, and not as a method or a group of settings is called"
        )
    if there.get(name, path) != path:
        raise UsageError(f"method file {text}: {there[name]} is called {name} too; rename one")
    if os.pathsep in str(path):
        raise UsageError(f"method file {text}: its path must not have {os.pathsep!r} in it")
    from_file(path)
    os.environ[FILES] = os.pathsep.join(map(str, {**there, name: path}.values()))
    return name


@functools.cache
def from_file(path: Path) -> "type[Method]":
    """Return the one Method of a file, which is run once in a process.

    Raises UsageError where it cannot be run, or has none or several.
    """
    module_name = f"pfedmoap_outside.{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if not spec or not spec.loader:
        raise UsageError(f"method file {path}: there is no such Python file")
    module = importlib.util.module_from_spec(spec)
    # pydantic looks types up there
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # it is the user's code: whatever it raises
        del sys.modules[module_name]
        line = _line_of(error, path)
        raise UsageError(
            f"method file {path}{line}: {type(error).__name__}: {last_line(error)}"
        ) from error
    return only_method(module, f"method file {path}")


def from_entry_point(point: EntryPoint) -> "type[Method]":
    """Return the method of a wheel. Raises UsageError where it cannot be imported or is none."""
    from pfedmoap_flwr.methods.base import Method

    what = f"method {point.name} of {point.dist.name if point.dist else 'a wheel'}"
    try:
        found = point.load()
    except Exception as error:  # it is the wheel's code: whatever it raises
        raise UsageError(f"{what}: {type(error).__name__}: {last_line(error)}") from error
    if isinstance(found, ModuleType):
        return only_method(found, what)
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise UsageError(f"{what}: {point.value} is no subclass of Method")
    return found


def only_method(module: ModuleType, what: str) -> "type[Method]":
    """Return the one Method class that a module defines. Raises UsageError for none or several."""
    from pfedmoap_flwr.methods.base import Method

    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Method)
        and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        names = ", ".join(kind.__name__ for kind in found) or "none"
        raise UsageError(f"{what}: must define one subclass of Method, and defines {names}")
    return found[0]


def origin(name: str) -> dict[str, str]:
    """Return where a method from outside came from, for the run's folder; {} for a built-in one."""
    if path := files().get(name):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return {"method_file": str(path), "method_sha256": digest}
    for point in entry_points(group=GROUP, name=name):
        if point.dist:
            return {"method_package": f"{point.dist.name} {point.dist.version}"}
    return {}


def _line_of(error: Exception, path: Path) -> str:
    """Return ", line 7": the last line of the file that was at work when it failed."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f", line {error.lineno}"
    found, step = "", error.__traceback__
    while step:
        if step.tb_frame.f_code.co_filename == str(path):
            found = f", line {step.tb_lineno}"
        step = step.tb_next
    return found
