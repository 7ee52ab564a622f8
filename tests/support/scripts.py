"""The scripts of the repository as modules."""

import importlib.util
from types import ModuleType

from support import ROOT


def load_script(name: str) -> ModuleType:
    """Return scripts/NAME.py, run as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
