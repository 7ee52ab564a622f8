"""FedProx: loss = CE + mu/2 ||P - P_g||^2, with the gradient of both terms."""

import pytest
import torch
from torch.nn import functional as F

from support.federation import Federate, make_method, tensor_files
from support.laws import THREE_ROUNDS

OVERFITTING = {"fedprox.mu": 0.01}


@pytest.mark.parametrize("mu", [0.0, 0.5, 3.0])
def test_the_loss_and_its_gradient_are_the_formulas(mu: float) -> None:
    method = make_method("fedprox", **{"fedprox.mu": mu})
    head = method.build()
    generator = torch.Generator().manual_seed(0)
    received = {"ctx": head.ctx.detach() + torch.randn(head.ctx.shape, generator=generator)}
    features = torch.randn(6, 64, generator=generator)
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    plain = F.cross_entropy(head(features), labels)
    (plain_gradient,) = torch.autograd.grad(plain, head.ctx)
    loss = method.loss(head, features, labels, received)
    (gradient,) = torch.autograd.grad(loss, head.ctx)
    apart = head.ctx.detach() - received["ctx"]
    torch.testing.assert_close(loss, plain + mu / 2 * apart.double().square().sum().float())
    # A detached pull, as in public code, would leave the gradient of cross-entropy alone
    torch.testing.assert_close(gradient, plain_gradient + mu * apart)


@pytest.mark.slow
def test_9_without_the_pull_it_is_promptfl(reference: Federate, federate: Federate) -> None:
    ours = federate("ours/run", method="fedprox", flat={"fedprox.mu": 0.0}, **THREE_ROUNDS)
    theirs = reference(method="promptfl", **THREE_ROUNDS)
    assert tensor_files(ours) == tensor_files(theirs)
    pulled = federate("pulled/run", method="fedprox", flat={"fedprox.mu": 5.0}, **THREE_ROUNDS)
    assert tensor_files(pulled) != tensor_files(theirs)
