"""Tensors compared bit for bit, and the accidents that befall files of them."""

from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor


def bits(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {
        name: (t.dtype, t.shape, t.contiguous().flatten().view(torch.uint8).tolist())
        for name, t in tensors.items()
    }


def torn(file: FileIO, content: bytes) -> None:
    file.write(content[: len(content) // 2])
    raise OSError("no space left on device")


def not_renamed(source: Path, target: Path) -> None:
    raise OSError("killed")


breakages = pytest.mark.parametrize(
    ("where", "broken"), [("pfedmoap_flwr.files.write", torn), ("os.replace", not_renamed)]
)
