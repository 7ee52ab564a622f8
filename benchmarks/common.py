"""What every benchmark needs: where it ran, best-of timing, peak memory, and how it reports."""

import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from pfedmoap_flwr.training import memory

PACKAGES = ("torch", "flwr", "open_clip_torch", "numpy")


def environment(device: torch.device) -> dict[str, Any]:
    """Return the device, threads, versions and commit that figures belong to."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "device": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def seconds(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Return the median time of `repeats` runs, in seconds, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """Return by how many bytes `work` raised the peak of allocated memory.

    On CUDA the allocator counts. On the CPU the resident memory of this process does, so call it
    through `in_fresh_process`: memory that an earlier job freed may be used again unseen.
    """
    memory.forget_peak(device)
    on_cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if on_cuda else psutil.Process().memory_info().rss
    work()
    return max(0, memory.peak(device) - before)


def in_fresh_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """Return `work(*arguments)` of a new Python process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(work, *arguments).result()


def report(name: str, device: torch.device, cells: list[dict[str, Any]], **ratios: float) -> None:
    """Print the cells as lines and, last of all, one JSON object with the ratios.

    Ratios have three significant digits: two decimals would print a very small one as none.
    """
    for cell in cells:
        print("  ".join(f"{key} {_short(value)}" for key, value in cell.items()))
    rounded = {key: float(f"{value:.3g}") for key, value in ratios.items()}
    result = {"benchmark": name, **rounded, "environment": environment(device), "cells": cells}
    print(json.dumps(result), flush=True)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    here = Path(__file__).parent
    return subprocess.run(command, cwd=here, capture_output=True, text=True).stdout.strip()
