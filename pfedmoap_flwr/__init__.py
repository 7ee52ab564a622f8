"""pFedMoAP on Flower: personalised federated prompt learning for a frozen CLIP.

    import pfedmoap_flwr as pf

    result = pf.run(method="promptfl", seed=1, data={"alpha": 0.1})
    print(result.summary["personal_accuracy"], result.folder)

Every name below is imported when it is first asked for: PyTorch and Flower take seconds to import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pfedmoap_flwr.api import RunResult, load, run
    from pfedmoap_flwr.comparison import compare
    from pfedmoap_flwr.config import Settings

    __version__: str

__all__ = ["RunResult", "Settings", "__version__", "compare", "load", "run"]

HOMES = {
    "run": "api",
    "load": "api",
    "compare": "comparison",
    "RunResult": "api",
    "Settings": "config",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("pfedmoap-flwr")
    if name in HOMES:
        return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
