"""FedAMP's cloud prompts and client step, against public code and the paper's formula."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pfedmoap_flwr.methods.base import ServerState, Upload
from pfedmoap_flwr.methods.fedamp import cloud, mix
from support.federation import Exchange, Federate, kept_head, make_method
from support.laws import SHORT
from support.oracle import numbers, oracle
from support.tiny import NUM_CLIENTS

VECTOR = oracle("fedamp_cloud")


@pytest.mark.parametrize("case", VECTOR["cases"], ids=lambda case: f"alphaK={case['alphaK']}")
def test_16_cloud_models_are_those_of_the_public_code(case: dict[str, Any]) -> None:
    models = numbers(VECTOR["inputs"]["models"]).flatten(1)
    squared = (models[:, None] - models).square().sum(-1)
    median = squared[~torch.eye(3, dtype=torch.bool)].median()
    # Ours counts sigma in median squared distances
    u = cloud(models, case["alphaK"], sigma=case["sigma"])
    xi = case["alphaK"] * torch.exp(-squared / case["sigma"]) / case["sigma"]
    expected = numbers(case["cloud"]).flatten(1)
    torch.testing.assert_close(mix(models, xi), expected, rtol=1e-6, atol=1e-6)
    scaled = case["alphaK"] * torch.exp(-squared / (case["sigma"] * median)) / case["sigma"]
    torch.testing.assert_close(u, mix(models, scaled))
    coefficients = numbers(case["coefficients"])
    torch.testing.assert_close(xi.fill_diagonal_(0), coefficients, rtol=1e-6, atol=1e-9)


class Linear(nn.Module):
    """The oracle's model in a head's place: logits = x ctx."""

    def __init__(self, ctx: Tensor) -> None:
        super().__init__()
        self.ctx = nn.Parameter(ctx)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.ctx


def test_16_the_clients_step_is_the_papers_not_the_released_one() -> None:
    step = VECTOR["client_step"]
    head: Any = Linear(numbers(step["start"]))
    x, labels = numbers(step["x"]), torch.tensor(step["labels"])
    received = {"ctx": numbers(step["cloud"])}
    weight = {"fedamp.lambda": step["lam"] / step["alphaK"]}
    loss = make_method("fedamp", **weight).loss(head, x, labels, received)
    (gradient,) = torch.autograd.grad(loss, head.ctx)
    after = head.ctx.detach() - step["lr"] * gradient
    papers = numbers(step["paper_half_lambda_over_alphaK_squared_norm_after_one_step"])
    torch.testing.assert_close(after, papers, rtol=1e-5, atol=1e-6)
    # The released pull has no gradient: its step is plain cross-entropy's
    assert step["released_after_one_step"] == step["plain_ce_after_one_step"]


def test_the_pull_is_live() -> None:
    method = make_method("fedamp", **{"fedamp.lambda": 2.0})
    head = method.build()
    features, labels = torch.randn(4, 64), torch.arange(4)
    (plain,) = torch.autograd.grad(F.cross_entropy(head(features), labels), head.ctx)
    u = torch.randn(head.ctx.shape)
    (gradient,) = torch.autograd.grad(method.loss(head, features, labels, {"ctx": u}), head.ctx)
    torch.testing.assert_close(gradient, plain + 2.0 * (head.ctx.detach() - u))


def test_a_mix_by_hand() -> None:
    prompts = numbers([[0.0, 0.0], [1.0, 0.0], [0.0, 4.0]])
    xi = numbers([[9.0, 0.25, 0.25], [0.5, 9.0, 0.0], [2.0, 2.0, 9.0]])
    # The third client's others come to 4: scaled to 1, its own prompt has weight 0, not -3
    expected = numbers([[0.25, 1.0], [0.5, 0.0], [0.5, 0.0]])
    torch.testing.assert_close(mix(prompts, xi), expected)


def test_every_client_gets_its_own_mix_and_a_newcomer_the_mean() -> None:
    method = make_method("fedamp")
    state = method.start()
    generator = torch.Generator().manual_seed(0)
    prompts = {i: torch.randn(4, 32, generator=generator) for i in (0, 2, 5)}
    method.merge(state, {i: Upload({"ctx": p}, 1) for i, p in prompts.items()})
    sent = method.send(state, [0, 1, 2], train=True)
    torch.testing.assert_close(sent[1]["ctx"], torch.stack(list(prompts.values())).mean(0))
    squared = {(i, j): (prompts[i] - prompts[j]).square().sum() for i in prompts for j in prompts}
    median = sorted(squared[i, j] for i in prompts for j in prompts if i != j)[2]
    for i in (0, 2):
        xi = {j: 0.05 * torch.exp(-squared[i, j] / median) for j in prompts if j != i}
        u = sum(x * prompts[j] for j, x in xi.items()) + (1 - sum(xi.values())) * prompts[i]
        torch.testing.assert_close(sent[i]["ctx"], u)
    measured = method.send(state, [0], train=False)
    assert torch.equal(measured[0]["ctx"], state.shared["ctx"])


def test_a_client_alone_keeps_its_prompt() -> None:
    method = make_method("fedamp")
    state = ServerState({"ctx": torch.zeros(4, 32)}, pool={3: {"ctx": torch.ones(4, 32)}})
    assert torch.equal(method.send(state, [3], train=True)[3]["ctx"], torch.ones(4, 32))


@pytest.mark.slow
def test_9_listening_to_nobody_it_is_local_training(
    federate: Federate, wire: list[Exchange]
) -> None:
    neutral = {"fedamp.alpha-k": 0.0, "fedamp.lambda": 0.0}
    ours = federate("ours", method="fedamp", flat=neutral, num_server_rounds=3, **SHORT)
    theirs = federate("theirs", method="coop", num_server_rounds=3, **SHORT)
    for i in range(NUM_CLIENTS):
        kept = [kept_head(run, i) for run in (ours, theirs)]
        assert torch.equal(kept[0]["ctx"], kept[1]["ctx"])
