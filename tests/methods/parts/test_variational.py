"""Draws, divergences and mean predictions, against PyTorch's distributions and by hand."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from pfedmoap_flwr.methods.parts.variational import (
    ImageNetwork,
    divergence,
    draw_every_step,
    draws_of,
    log_mean_probability,
)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_the_divergence_is_that_of_two_normal_distributions() -> None:
    mean, log_var, prior_mean, prior_log_var = normal(4, 7)
    q, p = Normal(mean, (log_var / 2).exp()), Normal(prior_mean, (prior_log_var / 2).exp())
    found = divergence(mean, log_var, prior_mean, prior_log_var)
    torch.testing.assert_close(found, kl_divergence(q, p))
    standard = kl_divergence(q, Normal(torch.zeros(7).double(), torch.ones(7).double()))
    torch.testing.assert_close(divergence(mean, log_var, 0.0, 0.0), standard)


def test_a_small_divergence_is_not_lost_in_rounding() -> None:
    (found,) = divergence(torch.zeros(1), torch.tensor([-9.0 + 1e-4]), 0.0, torch.tensor([-9.0]))
    apart = float(torch.tensor(-9.0 + 1e-4)) + 9.0
    assert found.item() == pytest.approx((math.expm1(apart) - apart) / 2, rel=1e-3)


def test_draws_have_the_mean_and_the_variance() -> None:
    eps = torch.randn(200_000, 1)
    draws = draws_of(torch.tensor([2.0]), torch.tensor([math.log(9.0)]), eps)
    assert draws.mean().item() == pytest.approx(2, abs=0.03)
    assert draws.var().item() == pytest.approx(9, rel=0.02)


def test_probabilities_are_averaged_not_logits() -> None:
    logits = torch.tensor([[[math.log(3), 0.0]], [[0.0, math.log(4)]]])
    found = log_mean_probability(logits).exp()
    torch.testing.assert_close(found, torch.tensor([[(3 / 4 + 1 / 5) / 2, (1 / 4 + 4 / 5) / 2]]))
    # Probabilities as small as these cannot be written down
    small = log_mean_probability(torch.tensor([[[0.0, 500.0]], [[0.0, 500.0]]]))
    torch.testing.assert_close(small, torch.tensor([[-500.0, 0.0]]))


def test_every_step_has_a_draw_of_its_own() -> None:
    parameter, eps = torch.zeros(3, requires_grad=True), torch.zeros(50)
    optimizer = torch.optim.SGD([parameter])
    draw_every_step(optimizer, eps, torch.Generator().manual_seed(3))
    seen = [eps.clone()]
    for _ in range(2):
        optimizer.step()
        seen.append(eps.clone())
    again = torch.Generator().manual_seed(3)
    for drawn in seen:
        assert torch.equal(drawn, torch.randn(50, generator=again))


def test_the_network_by_hand() -> None:
    network = ImageNetwork(6, 5, torch.Generator().manual_seed(0), shift=-4.0).double()
    plain = ImageNetwork(6, 5, torch.Generator().manual_seed(0)).double()
    weights = [(layer.weight, layer.bias) for layer in (plain.first, plain.second, plain.last)]
    assert [tuple(w.shape) for w, _ in weights] == [(3, 6), (3, 3), (5, 3)]
    x = normal(2, 6)
    for i, (weight, bias) in enumerate(weights):
        x_in = x if i == 0 else torch.where(x > 0, x, x.exp() - 1)
        x = x_in @ weight.t() + bias
    start = F.normalize(normal(2, 6))
    torch.testing.assert_close(network(start), plain(start) - 4)
