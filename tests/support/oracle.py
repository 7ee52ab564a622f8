"""Vectors computed from the methods' public code: inputs and outputs, numbers alone."""

import json
from typing import Any

import torch
from torch import Tensor

from support import ROOT


def oracle(name: str) -> dict[str, Any]:
    """Return one file of oracles/; it says itself which code, commit and lines it comes from."""
    said: dict[str, Any] = json.loads(
        (ROOT / "tests" / "paper" / "oracles" / f"{name}.json").read_text()
    )
    return said


def numbers(values: Any) -> Tensor:
    """Return nested lists as float64."""
    return torch.tensor(values, dtype=torch.float64)
