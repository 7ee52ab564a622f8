"""What choosing K = 9 experts for 1,000 participants costs: time and memory by size of the pool.

`python -m benchmarks.pool [--quick]`. Each cell has a process of its own. The baseline is what the
project did before: the whole pool in float64 for every participant; it is timed for one of them and
multiplied. Gaussian prompts are the worst case for bounds: all are about equally far apart.
"""

import argparse
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import in_fresh_process, peak_bytes, report, seconds
from pfedmoap_flwr.methods.parts.nearest import nearest
from pfedmoap_flwr.training import memory

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOKENS, EXPERTS = 16, 9
# Pools above are not held in memory; the baseline needs seven times the pool
MAX_POOL, MAX_BASELINE = 4 * 10**9, 10**9


class Windows(Mapping[int, Tensor]):
    """Prompts that overlap, shifted, in one Gaussian sequence: any number of them, no memory."""

    def __init__(self, count: int, width: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.count, self.width = count, width
        self.noise = torch.randn(TOKENS * (count + width), generator=generator)

    def __getitem__(self, client: int) -> Tensor:
        start = TOKENS * client
        return self.noise[start : start + TOKENS * self.width].view(TOKENS, self.width)

    def __contains__(self, client: object) -> bool:
        return client in range(self.count)

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.count))

    def __len__(self) -> int:
        return self.count


def make_pool(count: int, width: int, data: str) -> Mapping[int, Tensor]:
    """Return a pool of prompts (16, width): "gaussian", "clusters" of 100, or "windows"."""
    if data == "windows":
        return Windows(count, width)
    generator = torch.Generator().manual_seed(0)
    table = torch.empty(count, TOKENS, width)
    for part in table.split(2000):
        part.normal_(generator=generator)
    if data == "clusters":
        for part in table.split(100):
            part.mul_(0.1).add_(torch.randn(TOKENS, width, generator=generator))
    return dict(enumerate(table))


def baseline(pool: Mapping[int, Tensor], client: int) -> list[int]:
    """Return one client's experts the way the project found them before."""
    others = sorted(other for other in pool if other != client)
    prompts = torch.stack([pool[other].flatten() for other in others]).double()
    distances = (prompts - pool[client].flatten().double()).square().sum(dim=1)
    return [others[i] for i in distances.argsort(stable=True)[:EXPERTS].tolist()]


def measure(count: int, width: int, data: str, participants: int) -> dict[str, Any]:
    """Return one cell: seconds, gigabytes, and the baseline where it fits."""
    pool = make_pool(count, width, data)
    clients = list(range(0, count, count // participants))[:participants]
    # Threads and matrix kernels are started before the clock is
    nearest({i: pool[i] for i in clients}, clients[:100], EXPERTS, device=str(DEVICE))
    found: dict[int, list[int]] = {}
    took = 0.0

    def search() -> None:
        nonlocal took
        start = time.perf_counter()
        found.update(nearest(pool, clients, EXPERTS, device=str(DEVICE)))
        took = time.perf_counter() - start

    extra = peak_bytes(search, DEVICE)
    size = 0 if data == "windows" else count * TOKENS * width * 4
    cell: dict[str, Any] = {"cell": "pool", "N": count, "prompt": f"{TOKENS}x{width}", "data": data}
    cell |= {"seconds": took, "pool_gb": size / 1e9, "extra_gb": extra / 1e9}
    cell["process_gb"] = memory.peak_resident() / 1e9
    if 0 < size <= MAX_BASELINE:
        assert all(baseline(pool, client) == found[client] for client in clients[:2])
        cell["before_s"] = participants * seconds(lambda: baseline(pool, clients[2]), DEVICE, 1)
        cell["before"] = "one participant, multiplied"
        cell["ratio"] = cell["before_s"] / took
    return cell


def main() -> None:
    """Measure all cells and report them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small pools only")
    quick = parser.parse_args().quick
    sizes = [1000, 3000] if quick else [1000, 10_000, 100_000, 1_000_000]
    participants = 100 if quick else 1000
    jobs = []
    for width in (128,) if quick else (128, 512):
        for count in sizes:
            fits = count * TOKENS * width * 4 <= MAX_POOL
            jobs.append((count, width, "gaussian" if fits else "windows"))
    jobs.append((3000 if quick else 100_000, 128, "clusters"))
    cells = [in_fresh_process(measure, *job, participants) for job in jobs]
    ratios = {}
    for cell in cells:
        if cell["N"] == 100_000 and cell["data"] == "gaussian":
            ratios[f"seconds_1e5_{cell['prompt']}"] = cell["seconds"]
            ratios[f"gb_1e5_{cell['prompt']}"] = cell["process_gb"]
            if "ratio" in cell:
                ratios["ratio_1e5"] = cell["ratio"]
    report("pool", DEVICE, cells, **ratios)


if __name__ == "__main__":
    main()
