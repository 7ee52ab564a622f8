"""CUDA gives what the CPU gives, up to float error."""

import pytest
import torch

from pfedmoap_flwr import methods
from support.federation import Federate

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="this machine has no CUDA device"
)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("at_once", [1, 0])
@pytest.mark.parametrize("method", methods.names())
def test_a_federation_on_cuda_equals_one_on_the_cpu(
    method: str, at_once: int, precision: str, federate: Federate
) -> None:
    cpu = federate("cpu", method=method, device="cpu").rounds()
    cuda = federate(
        "cuda",
        method=method,
        device="cuda",
        clients_at_once=at_once,
        flat={"clip.precision": precision},
    ).rounds()
    rel = 1e-3 if precision == "float32" else 0.05
    for on_cpu, on_cuda in zip(cpu, cuda, strict=True):
        if on_cpu.train_loss is not None:
            assert on_cuda.train_loss == pytest.approx(on_cpu.train_loss, rel=rel)
        for client, metrics in on_cpu.clients.items():
            # one of 16 test images may fall the other way
            assert on_cuda.clients[client] == pytest.approx(metrics, abs=0.07)
