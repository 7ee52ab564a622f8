"""Gradients of single images, of which only some are computed in one product."""

import pytest
import torch
from torch.nn import functional as F

from pfedmoap_flwr.methods.parts.privacy import TOGETHER, by_image_of


@pytest.mark.parametrize("count", [1, TOGETHER, 2 * TOGETHER + 3])
def test_each_images_gradient_is_that_of_its_own_backward_pass(count: int) -> None:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    labels = torch.arange(count) % 3
    weight, bias, unused = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((3, 5), (3,), (2, 2))
    )
    losses = F.cross_entropy(torch.tanh(images @ weight.T) + bias, labels, reduction="none")
    of_weight, of_bias, of_unused = by_image_of(losses, [weight, bias, unused])
    for i, loss in enumerate(losses):
        expected = torch.autograd.grad(loss, [weight, bias], retain_graph=True)
        torch.testing.assert_close((of_weight[i], of_bias[i]), expected)
    assert torch.equal(of_unused, torch.zeros(count, 2, 2))
