"""How much memory this process has held at most."""

import contextlib
import ctypes
import gc
from pathlib import Path

import psutil
import torch


def peak(device: torch.device) -> int:
    """Return the most bytes so far: of CUDA's allocator, or of resident memory on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident()


def peak_resident() -> int:
    """Return the largest resident memory of this process so far, in bytes; on macOS that of now."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says there includes the process that started this one
        lines = status.read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    held = psutil.Process().memory_info()
    return int(getattr(held, "peak_wset", held.rss))


def forget_peak(device: torch.device) -> None:
    """Begin anew: freed memory goes back to the system, where Linux lets us, and CUDA's peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
