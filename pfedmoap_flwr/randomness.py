"""Everything random is a function of names and numbers: (seed, client, round, ...)."""

import hashlib

import numpy as np
import torch


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on every part and on nothing else."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def torch_generator(*parts: int | str) -> torch.Generator:
    """Return a CPU generator seeded by the parts (CPU: the same draws on every device)."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def numpy_generator(*parts: int | str) -> np.random.Generator:
    """Return a NumPy generator seeded by the parts."""
    return np.random.default_rng(derive_seed(*parts))
