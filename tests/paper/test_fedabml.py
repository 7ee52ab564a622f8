"""FedABML: one draw a step, the divergence, both merges, mean predictions, what travels."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from pfedmoap_flwr.clip.template import parse
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.base import ServerState, Split, Tensors, Upload
from pfedmoap_flwr.training import local
from support.federation import Exchange, Federate, kept_head, make_method, make_work
from support.tiny import NUM_CLIENTS

# A posterior that is held near its prior cannot learn images by heart
OVERFITTING = {"fedabml.zeta": 0.0, "lr": 0.02}
IMAGES = Split(torch.randn(8, 64, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 4)


def shifted(method: Any) -> tuple[Any, dict[str, Tensor]]:
    """A head that has left the prior that it received."""
    received = method.send(method.start(), [0], train=True)[0]
    head = method.build()
    with torch.no_grad():
        head.ctx += 0.01 * torch.randn_like(head.ctx)
        head.log_var += 0.5 * torch.randn_like(head.log_var)
        head.eps.normal_()
    return head, received


@pytest.mark.parametrize("kl", ["sum", "mean"])
def test_the_loss_is_cross_entropy_at_one_draw_and_the_divergence(kl: str) -> None:
    method = make_method("fedabml", **{"fedabml.zeta": 0.3, "fedabml.kl": kl})
    head, received = shifted(method)
    drawn = head.ctx + (head.log_var / 2).exp() * head.eps
    text = method.encoder(parse("{soft:4} {class}.", len))(drawn)
    logits = method.clip.logit_scale * F.normalize(IMAGES.features, dim=-1) @ text.t()
    task = F.cross_entropy(logits, IMAGES.labels)
    q, p = (
        Normal(of["ctx"], (of["log_var"] / 2).exp())
        for of in (dict(head.named_parameters()), received)
    )
    entries = kl_divergence(q, p)
    assert entries.numel() == 4 * 32
    expected = task + 0.3 * (entries.sum() if kl == "sum" else entries.sum() / 128)
    loss = method.loss(head, IMAGES.features, IMAGES.labels, received)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_the_gradient_goes_through_the_draw() -> None:
    method = make_method("fedabml", **{"fedabml.zeta": 0.0})
    head, received = shifted(method)
    loss = method.loss(head, IMAGES.features, IMAGES.labels, received)
    of_mean, of_log_var = torch.autograd.grad(loss, [head.ctx, head.log_var])
    plain = make_method("promptfl")
    prompt = plain.build()
    sigma = (head.log_var / 2).exp().detach()
    prompt.load({"ctx": head.ctx.detach() + sigma * head.eps.detach()})
    (at_draw,) = torch.autograd.grad(
        plain.loss(prompt, IMAGES.features, IMAGES.labels, {}), prompt.ctx
    )
    torch.testing.assert_close(of_mean, at_draw, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(of_log_var, at_draw * head.eps * sigma / 2, rtol=1e-4, atol=1e-7)


def draws(client_id: int, server_round: int) -> list[Tensor]:
    """What a training of two epochs with two batches each draws, step by step."""
    method = make_method("fedabml", batch_size=4)
    received = method.send(method.start(), [0], train=True)[0]
    seen: list[Tensor] = []
    loss_of = method.loss

    def noted(head: Any, features: Tensor, labels: Tensor, received: Tensors) -> Tensor:
        seen.append(head.eps.detach().clone())
        return loss_of(head, features, labels, received)

    method.loss = noted
    work = make_work(method, method.build(), IMAGES, received, client_id, server_round)
    local.train(method, [work])
    return seen


def test_every_step_draws_anew_by_seed_client_and_round() -> None:
    seen = {key: draws(*key) for key in [(0, 1), (0, 2), (1, 1)]}
    every = [eps for steps in seen.values() for eps in steps]
    assert len(every) == 12
    assert len({tuple(eps.flatten().tolist()) for eps in every}) == 12
    assert torch.stack(every).std().item() == pytest.approx(1, abs=0.1)
    torch.manual_seed(99)
    assert all(torch.equal(a, b) for a, b in zip(draws(0, 2), seen[0, 2], strict=True))


def test_a_prediction_is_the_mean_probability_over_the_draws() -> None:
    method = make_method("fedabml", **{"fedabml.samples": 3, "fedabml.std": 0.5})
    head = method.build().eval()
    sigma = (head.log_var / 2).exp()
    assert sigma.flatten()[0].item() == pytest.approx(0.5)
    each = []
    for eps in head.draws:
        text = head.encoder(head.ctx + 0.5 * eps).double()
        cosines = F.normalize(IMAGES.features, dim=-1).double() @ text.t()
        each.append((head.logit_scale * cosines).softmax(-1))
    assert len(each) == 3
    expected = torch.stack(each).mean(0)
    with torch.no_grad():
        found = head.predict(IMAGES.features, head.encode()).double().exp()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert (each[0] - expected).abs().max() > 1e-2
    # No client draws otherwise, so the common model is one and the same for all
    assert torch.equal(method.build().draws, head.draws)


def test_16_the_prior_after_two_clients_by_hand() -> None:
    sent = {
        0: Upload({"ctx": torch.tensor([1.0]), "log_var": torch.tensor([4.0]).log()}, 1),
        1: Upload({"ctx": torch.tensor([5.0]), "log_var": torch.tensor([0.25]).log()}, 3),
    }
    # Mean (1 + 3 x 5) / 4 = 4. Moments: (4 + 9) / 4 + 3 (1/4 + 1) / 4. Logs: 4^(1/4) (1/4)^(3/4)
    for how, variance in (("moments", 4.1875), ("log", 0.5)):
        method = make_method("fedabml", **{"fedabml.variance": how})
        state = ServerState({"ctx": torch.zeros(1), "log_var": torch.zeros(1)})
        method.merge(state, sent)
        assert state.shared["ctx"].item() == 4
        assert state.shared["log_var"].item() == pytest.approx(math.log(variance), rel=1e-6)
        assert state.shared["log_var"].dtype == torch.float32


def test_9_without_variance_and_divergence_it_is_promptfl() -> None:
    options = {"fedabml.std": 1e-15, "fedabml.zeta": 0.0}
    method, plain = make_method("fedabml", **options), make_method("promptfl")
    works = []
    for made in (method, plain):
        received = made.send(made.start(), [0], train=True)[0]
        head = made.build()
        head.load(received)
        works.append(make_work(made, head, IMAGES, received))
        local.train(made, works[-1:])
    start = plain.build().ctx
    torch.testing.assert_close(works[0].head.ctx, works[1].head.ctx, rtol=1e-4, atol=1e-6)
    assert (works[0].head.ctx - start).abs().max() > 1e-4


def test_mean_and_log_variance_travel_and_both_are_learned(
    federate: Federate, wire: list[Exchange]
) -> None:
    run = federate(method="fedabml", num_server_rounds=1)
    trained = [e for e in wire if e.kind == "train"]
    assert len(trained) == NUM_CLIENTS
    for exchange in trained:
        assert exchange.up.keys() == exchange.down.keys() == {"ctx", "log_var"}
        kept = kept_head(run, exchange.client)
        for name in exchange.up:
            assert not torch.equal(exchange.up[name], exchange.down[name])
            assert torch.equal(exchange.up[name], kept[name])


def test_a_prior_without_width_is_refused() -> None:
    with pytest.raises(UsageError, match=r"fedabml.std=0.0: must be > 0"):
        make_method("fedabml", **{"fedabml.std": 0.0})
