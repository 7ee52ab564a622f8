"""What a run was made with: versions, device, commit."""

import os
import platform
import subprocess
from datetime import datetime
from importlib.metadata import version

import torch

from pfedmoap_flwr.assets import asset

PACKAGES = ("pfedmoap-flwr", "flwr", "torch", "open_clip_torch", "datasets", "numpy")


def environment() -> dict[str, str]:
    """Return versions, device and commit of this process."""
    # Flower runs a copy of the code without history and binary files: those lie in the repository
    repository = asset("clip/mini.safetensors").parent
    git = ["git", "-C", str(repository), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        commit = ""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        **{package: version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": str(os.cpu_count()),
        "device": device,
        "commit": commit or "unknown",
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
