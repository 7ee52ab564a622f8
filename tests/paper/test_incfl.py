"""IncFL: a client's weight, the server's step, where rho comes from and what travels."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.base import ServerState, Split, Upload
from pfedmoap_flwr.methods.incfl import weights
from pfedmoap_flwr.training import local
from support.federation import Exchange, Federate, kept_head, make_method, make_work
from support.oracle import numbers, oracle
from support.tiny import NUM_CLIENTS

VECTOR = oracle("maxfl_weights")
LOSSES, RHO = numbers(VECTOR["losses"]), numbers(VECTOR["rho"])


def uploads(w: Tensor, apart: Tensor, loss: Tensor, rho: Tensor) -> dict[int, Upload]:
    """One for each client; numbers of images that would move a mean weighted by them."""
    return {
        i: Upload({"ctx": w - apart[i], "loss": loss[i], "rho": rho[i]}, num_examples=1 + 9 * i)
        for i in range(len(apart))
    }


@pytest.mark.parametrize("case", VECTOR["cases"], ids=lambda case: f"T={case['temperature']}")
def test_16_weights_and_step_are_those_of_the_closed_form(case: dict[str, Any]) -> None:
    temperature = case["temperature"]
    q = weights(LOSSES, RHO, temperature)
    torch.testing.assert_close(q, numbers(case["weight_q"]), rtol=1e-6, atol=1e-9)
    method = make_method(
        "incfl",
        **{
            "incfl.temperature": temperature,
            "incfl.eta-g": case["server_lr"],
            "incfl.eps": case["server_eps"],
        },
    )
    w = numbers(VECTOR["w"])
    state = ServerState({"ctx": w})
    method.merge(state, uploads(w, numbers(VECTOR["deltas_old_minus_new"]), LOSSES, RHO))
    torch.testing.assert_close(state.shared["ctx"], numbers(case["after"]), rtol=1e-6, atol=1e-7)
    assert state.metrics["sum-q"] == pytest.approx(sum(case["weight_q"]), rel=1e-6)
    assert state.metrics["appeal"] == 0.5


@pytest.mark.parametrize("temperature", [None, 0.5, 10.0])
def test_q_is_the_derivative_of_the_objective(temperature: float | None) -> None:
    loss = LOSSES.clone().requires_grad_()
    if temperature is None:
        objective = F.softplus(loss - RHO).sum()
    else:
        objective = -torch.sigmoid(temperature * (RHO - loss)).sum()
    (expected,) = torch.autograd.grad(objective, loss)
    torch.testing.assert_close(weights(LOSSES, RHO, temperature), expected)


def test_q_far_from_rho_keeps_its_digits() -> None:
    q = weights(numbers([7.0, -7.0]), numbers([0.0, 0.0]), 10.0)
    expected = 10 * math.exp(-70) / (1 + math.exp(-70)) ** 2
    assert q.tolist() == pytest.approx([expected, expected], rel=1e-9)


@pytest.mark.parametrize(("weight", "larger"), [("sigmoid", 0), ("softplus", 1)])
def test_the_setting_says_who_counts_more(weight: str, larger: int) -> None:
    method = make_method("incfl", **{"incfl.weight": weight})
    state = ServerState({"ctx": torch.zeros(2)})
    # Client 0 is near its own loss, client 1 far above it; each pulls one coordinate to 1
    loss, rho = torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0])
    method.merge(state, uploads(torch.zeros(2), -torch.eye(2), loss, rho))
    step = state.shared["ctx"]
    assert step.argmax() == larger
    assert step.sum().item() == pytest.approx(1, abs=1e-5)


def test_9_clients_that_count_alike_give_the_plain_mean() -> None:
    method = make_method("incfl", **{"incfl.temperature": 1e-6, "incfl.eps": 1e-15})
    state = ServerState({"ctx": torch.full((2,), 5.0)})
    apart = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, -3.0]])
    loss = torch.tensor([0.3, 1.0, 2.0])
    method.merge(state, uploads(state.shared["ctx"], apart, loss, torch.ones(3)))
    torch.testing.assert_close(state.shared["ctx"], 5 - apart.mean(0), rtol=1e-5, atol=1e-5)


def loss_of(method: Any, ctx: Tensor, images: Split) -> float:
    """The mean cross-entropy of a prompt in float64, written out."""
    text = method.build().encoder(ctx).detach().double()
    cosines = F.normalize(images.features, dim=-1).double() @ text.t()
    logits = method.clip.logit_scale * cosines
    own = logits[torch.arange(len(images)), images.labels]
    return float((logits.exp().sum(-1).log() - own).mean())


def test_rho_is_the_loss_after_the_first_training_and_stays() -> None:
    method = make_method("incfl", lr=0.05, batch_size=4)
    images = Split(torch.randn(12, 64), torch.arange(12) % 4)
    first = method.send(method.start(), [0], train=True)[0]
    work = make_work(method, method.build(), images, first)
    local.train(method, [work])
    sent = method.upload(work)
    assert sent["loss"].item() == pytest.approx(loss_of(method, first["ctx"], images), rel=1e-4)
    assert sent["rho"].item() == pytest.approx(loss_of(method, sent["ctx"], images), rel=1e-4)
    assert sent["rho"] < sent["loss"] - 0.01

    head, second = method.build(), {"ctx": first["ctx"].flip(0)}
    head.load(work.head.state())
    head.load(second)
    again = make_work(method, head, images, second, server_round=2)
    local.train(method, [again])
    other = method.upload(again)
    assert other["rho"] == sent["rho"]
    assert other["loss"].item() == pytest.approx(loss_of(method, second["ctx"], images), rel=1e-4)
    assert abs(other["loss"] - sent["loss"]) > 1e-3


def test_a_prompt_and_two_losses_travel_and_the_sum_of_q_is_logged(
    federate: Federate, wire: list[Exchange]
) -> None:
    run = federate(method="incfl")
    trained = [e for e in wire if e.kind == "train"]
    assert len(trained) == 2 * NUM_CLIENTS
    for exchange in trained:
        assert exchange.down.keys() == {"ctx"}
        assert exchange.up.keys() == {"ctx", "loss", "rho"}
        assert exchange.up["rho"] == kept_head(run, exchange.client)["rho"]
    for record in run.rounds()[1:]:
        sent = [e.up for e in trained if e.round == record.round]
        z = [10 * (up["loss"].item() - up["rho"].item()) for up in sent]
        expected = sum(10 / (2 + math.exp(x) + math.exp(-x)) for x in z)
        assert record.metrics["sum-q"] == pytest.approx(expected, rel=1e-6)
        assert record.metrics["appeal"] == sum(x < 0 for x in z) / NUM_CLIENTS


def test_a_temperature_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match=r"incfl.temperature=0.0: must be > 0"):
        make_method("incfl", **{"incfl.temperature": 0.0})
