"""The most memory that a process has held: against an allocation of a known size."""

import subprocess
import sys

import pytest
import torch

from pfedmoap_flwr.training import memory
from support.federation import Federate

SIZE = 300 * 10**6
ALLOCATE = f"""
import numpy as np, torch
from pfedmoap_flwr.training import memory
cpu = torch.device("cpu")
before = memory.peak(cpu)
held = np.ones({SIZE}, np.uint8)
with_it = memory.peak(cpu)
del held
after = memory.peak(cpu)
memory.forget_peak(cpu)
print(with_it - before, after - with_it, memory.peak(cpu) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps a peak that can be forgotten")
def test_a_peak_stays_until_it_is_forgotten() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ALLOCATE], capture_output=True, text=True, check=True
    )
    rise, fall, left = (int(word) for word in done.stdout.split())
    assert rise == pytest.approx(SIZE, rel=0.1)
    assert fall > -SIZE / 10
    assert left < SIZE / 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
def test_on_cuda_its_allocator_counts() -> None:
    device = torch.device("cuda")
    memory.forget_peak(device)
    before = memory.peak(device)
    held = torch.ones(SIZE // 4, device=device)
    del held
    assert memory.peak(device) - before == pytest.approx(SIZE, rel=0.1)


def test_each_round_says_what_each_clients_process_held(reference: Federate) -> None:
    run = reference(method="promptfl")
    trained = [record for record in run.rounds() if record.round]
    assert all(record.memory.keys() == record.bytes_up.keys() for record in trained)
    sizes = [size for record in trained for size in record.memory.values()]
    assert run.summary()["peak_memory"] == max(sizes)
    # PyTorch alone takes more than the one, no machine has the other
    assert 50e6 < min(sizes) <= max(sizes) < 1e12
