"""Where the embedded data set and the mini CLIP lie on disk.

Flower's app bundle drops binary files and shadows the installed package, so looking beside this
file is not enough: the installed distribution (editable or not) is asked as well, and the wheel
`pfedmoap-assets`, for machines that have the bundle alone.
"""

import importlib.metadata
import json
import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlparse

from pfedmoap_flwr.errors import UsageError

ENVIRONMENT_VARIABLE = "PFEDMOAP_ASSETS"
PACKAGE, WHEEL = "pfedmoap-flwr", "pfedmoap-assets"


def asset(relative: str) -> Path:
    """Return the path of an embedded asset, e.g. "clip/mini.json".

    Raises UsageError that names the folders searched, and says how to get it.
    """
    folders = list(_folders())
    for folder in folders:
        if (folder / relative).exists():
            return folder / relative
    raise UsageError(
        f"asset '{relative}' not found in {', '.join(map(str, folders))}; install the package from "
        f"its repository (pip install -e .) or the wheel {WHEEL}, or set {ENVIRONMENT_VARIABLE} to "
        "the assets folder"
    )


def _folders() -> Iterator[Path]:
    if named := os.environ.get(ENVIRONMENT_VARIABLE):
        yield Path(named)
    yield Path(__file__).parent / "assets"
    if installed := _distribution(PACKAGE):
        if origin := installed.read_text("direct_url.json"):
            path = unquote(urlparse(json.loads(origin)["url"]).path)
            yield Path(path) / "pfedmoap_flwr" / "assets"
        yield Path(str(installed.locate_file("pfedmoap_flwr/assets")))
    if wheel := _distribution(WHEEL):
        yield Path(str(wheel.locate_file("pfedmoap_assets")))


def _distribution(name: str) -> importlib.metadata.Distribution | None:
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
