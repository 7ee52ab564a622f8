"""What a run was made with: versions, device, commit."""

import functools
import os
import platform
import subprocess
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version

import torch

from pfedmoap_flwr.assets import asset
from pfedmoap_flwr.errors import UsageError

PACKAGES = ("pfedmoap-flwr", "flwr", "torch", "open_clip_torch", "datasets", "numpy")


def environment() -> dict[str, str]:
    """Return versions, device and commit of this process."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        **_versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": str(os.cpu_count()),
        "device": device,
        "commit": _commit() or "unknown",
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _commit() -> str:
    """Return the commit of the repository that this code is from, or "" where there is none."""
    try:
        # Flower runs a copy of the code without history; the binary files lie in the repository
        repository = asset("clip/mini.safetensors").parent
        git = ["git", "-C", str(repository), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except (UsageError, FileNotFoundError):  # an app bundle alone; a machine without git
        return ""


@functools.cache
def _versions() -> dict[str, str]:
    """Return the version of each package; they stay the same while a process lasts."""
    return {package: _version(package) for package in PACKAGES}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # ourselves, where Flower brought the code in a bundle
        return "not installed"
