"""CUDA gives what the CPU gives, up to float error."""

from collections.abc import Callable

import pytest
import torch

from pfedmoap_flwr import methods
from pfedmoap_flwr.report.run_folder import RunFolder


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
@pytest.mark.parametrize("method", methods.names())
def test_a_federation_on_cuda_equals_one_on_the_cpu(
    method: str, federate: Callable[..., RunFolder]
) -> None:
    runs = [federate(device, method=method, device=device).rounds() for device in ("cpu", "cuda")]
    for on_cpu, on_cuda in zip(*runs, strict=True):
        assert on_cuda.train_loss == pytest.approx(on_cpu.train_loss, rel=1e-3)
        for client, metrics in on_cpu.clients.items():
            # one of 16 test images may fall the other way
            assert on_cuda.clients[client] == pytest.approx(metrics, abs=0.07)
