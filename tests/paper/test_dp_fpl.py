"""DP-FPL: factors, clipping and noise against numbers of its public code; what epsilon says."""

import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from pfedmoap_flwr.methods.base import Split, Upload
from pfedmoap_flwr.methods.parts.factors import factorise, whole_gradient
from pfedmoap_flwr.methods.parts.privacy import clipped, delta_of, epsilon_of
from pfedmoap_flwr.training import capacity, local
from support.federation import Exchange, Federate, make_method, make_work
from support.oracle import numbers, oracle
from support.tiny import NUM_CLIENTS

# Noise holds it back, by design
OVERFITTING = {"dp_fpl.noise": 0.0}

VECTOR = oracle("dpfpl_factor")
IMAGES = Split(
    torch.randn(8, 64, generator=torch.Generator().manual_seed(0)),
    torch.tensor([0, 1, 2, 3, 0, 1, 2, 3]),
)


# Factors


@pytest.mark.parametrize("case", VECTOR["cases"], ids=lambda case: str(case["shape"]))
def test_16_factors_and_gradient_are_those_of_the_public_code(case: dict[str, Any]) -> None:
    matrix = numbers(case["X"])
    u, v = factorise(matrix, numbers(case["v_start"]))
    near: Any = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(u, numbers(case["u"]), **near)
    torch.testing.assert_close(v, numbers(case["v"]), **near)
    torch.testing.assert_close(matrix - u @ v, numbers(case["residual"]), **near)
    of_u, of_v = numbers(case["grad_u"]), numbers(case["grad_v"])
    released = whole_gradient(of_u, of_v, u, v, released=True)
    torch.testing.assert_close(released, numbers(case["full_grad_released"]), **near)
    papers = whole_gradient(of_u, of_v, u, v)
    torch.testing.assert_close(papers, numbers(case["full_grad_unscaled_projection"]), **near)
    assert (papers / 10 - released).abs().max() > 0.01


def test_a_gradient_comes_back_but_for_what_both_factors_miss() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix, gradient = torch.randn(2, 5, 9, generator=generator, dtype=torch.float64)
    u, v = factorise(matrix, torch.randn(9, 2, generator=generator, dtype=torch.float64))
    off_u = torch.eye(5).double() - u @ u.T
    off_v = torch.eye(9).double() - v.T @ v
    found = whole_gradient(gradient @ v.T, u.T @ gradient, u, v)
    torch.testing.assert_close(found, gradient - off_u @ gradient @ off_v)
    # With as many columns as the matrix has rows, everything passes
    u, v = factorise(matrix, torch.randn(9, 5, generator=generator, dtype=torch.float64))
    torch.testing.assert_close(whole_gradient(gradient @ v.T, u.T @ gradient, u, v), gradient)


# Privacy


def test_16_clipping_is_that_of_the_public_code() -> None:
    said = VECTOR["clip"]
    gradient = numbers(said["grad"])
    (found,) = clipped(said["threshold"], gradient[None])
    torch.testing.assert_close(found[0], numbers(said["clipped"]), rtol=1e-6, atol=1e-6)
    (short,) = clipped(said["norm"] + 1, gradient[None])
    assert torch.equal(short[0], gradient)


def test_parts_are_clipped_together_and_each_gradient_by_itself() -> None:
    a, b = clipped(5.0, numbers([[6.0], [0.3], [0.0]]), numbers([[[8.0]], [[0.4]], [[0.0]]]))
    torch.testing.assert_close(a, numbers([[3.0], [0.3], [0.0]]))
    torch.testing.assert_close(b, numbers([[[4.0]], [[0.4]], [[0.0]]]))


@pytest.mark.parametrize("said", VECTOR["noise_std"], ids=lambda said: str(said["epsilon"]))
def test_16_released_noise_is_that_of_the_public_code(said: dict[str, Any]) -> None:
    flat = {"dp_fpl.epsilon": said["epsilon"], "dp_fpl.clip-norm": float(said["clip"])}
    options = {"num_server_rounds": said["rounds"], "batch_size": said["batch"]}
    method = make_method("dp_fpl", compat="released", **options, **flat)
    assert method.private().std == pytest.approx(said["local_std"], rel=1e-6)
    assert make_method("dp_fpl", **options, **flat).private().std == 1.0 * 10 / said["batch"]


@pytest.mark.parametrize("mu", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 4.0])
def test_delta_is_the_integral_over_the_two_distributions(mu: float, epsilon: float) -> None:
    # What more an outcome is likely with the image than e^epsilon times without
    x = torch.linspace(-12, 16, 2_000_001, dtype=torch.float64)
    with_image = torch.exp(-((x - mu) ** 2) / 2) / math.sqrt(2 * math.pi)
    without = torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    integral = torch.trapezoid((with_image - math.exp(epsilon) * without).clamp(min=0), x)
    assert delta_of(mu, epsilon) == pytest.approx(integral.item(), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("mu", [0.01, 0.3, 1.0, 7.0, 60.0])
@pytest.mark.parametrize("delta", [1e-9, 1e-5, 1e-2])
def test_epsilon_is_the_inverse_and_below_what_renyi_divergence_gives(
    mu: float, delta: float
) -> None:
    epsilon = epsilon_of(mu, delta)
    assert delta_of(mu, epsilon) <= delta * (1 + 1e-6)
    if epsilon > 1e-9:
        assert delta_of(mu, epsilon) == pytest.approx(delta, rel=1e-6)
    # min over alpha of alpha rho + ln(1/delta) / (alpha - 1), rho = mu^2 / 2, in closed form
    rho, log = mu**2 / 2, math.log(1 / delta)
    assert epsilon <= rho + 2 * math.sqrt(rho * log)
    alphas = 1 + torch.logspace(-4, 6, 100_001, dtype=torch.float64)
    searched = (alphas * rho + log / (alphas - 1)).min().item()
    assert searched == pytest.approx(rho + 2 * math.sqrt(rho * log), rel=1e-6)


def test_noise_that_drowns_everything_costs_nothing() -> None:
    assert epsilon_of(1e-7, 1e-5) == pytest.approx(0, abs=1e-9)


# Steps


def one_by_one(head: Any, images: Split) -> Tensor:
    """Each image's gradient to the prompt, by a backward pass of its own."""
    found = []
    for image, label in zip(images.features, images.labels, strict=True):
        prompt = (head.ctx + head.local).detach().requires_grad_()
        logits = head.logit_scale * F.normalize(image, dim=-1) @ head.encoder(prompt).t()
        found += torch.autograd.grad(F.cross_entropy(logits[None], label[None]), prompt)
    return torch.stack(found)


def expected_gradients(head: Any, images: Split, clip: float, batch: int) -> tuple[Tensor, Tensor]:
    u, v = factorise(head.local.detach(), head.start)
    sums = [torch.zeros(4, 32), torch.zeros(4, u.shape[1]), torch.zeros(u.shape[1], 32)]
    for gradient in one_by_one(head, images):
        three = gradient, gradient @ v.T, u.T @ gradient
        length = sum(part.square().sum() for part in three).sqrt()
        for total, part in zip(sums, three, strict=True):
            total += part * min(1.0, clip / length.item())
    of_ctx, of_u, of_v = (total / batch for total in sums)
    return of_ctx, of_u @ v + u @ of_v - u @ u.T @ of_u @ v


@pytest.mark.parametrize("clip", [1e-3, 15.0, 1e6])
def test_every_image_is_clipped_before_the_sum(clip: float) -> None:
    method = make_method("dp_fpl", **{"dp_fpl.clip-norm": clip, "dp_fpl.rank": 2})
    head = make_work(method, method.build(), IMAGES).head
    lengths = one_by_one(head, IMAGES).flatten(1).norm(dim=1)
    assert clip != 15.0 or lengths.min() < clip < lengths.max()
    # A batch that is not full, with rows that fill it up
    few = Split(IMAGES.features[:5], IMAGES.labels[:5])
    labels = IMAGES.labels.clone()
    labels[5:] = -100
    loss = method.loss(head, IMAGES.features, labels, {})
    torch.testing.assert_close(loss, F.cross_entropy(head(few.features), few.labels))
    found = torch.autograd.grad(loss, [head.ctx, head.local])
    for gradient, expected in zip(found, expected_gradients(head, few, clip, 8), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6 * clip)


def test_without_clipping_and_with_all_columns_it_is_plain_cross_entropy() -> None:
    method = make_method("dp_fpl", **{"dp_fpl.clip-norm": 1e9, "dp_fpl.rank": 99})
    head = make_work(method, method.build(), IMAGES).head
    assert head.start.shape == (32, 4)
    plain = F.cross_entropy(head(IMAGES.features), IMAGES.labels)
    (expected,) = torch.autograd.grad(plain, head.ctx)
    loss = method.loss(head, IMAGES.features, IMAGES.labels, {})
    for gradient in torch.autograd.grad(loss, [head.ctx, head.local]):
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)


def test_released_clips_the_batchs_mean_and_each_part_by_itself() -> None:
    clip = 0.5
    options = {"dp_fpl.clip-norm": clip, "dp_fpl.rank": 2}
    method = make_method("dp_fpl", compat="released", **options)
    head = make_work(method, method.build(), IMAGES).head
    mean = one_by_one(head, IMAGES).mean(0)
    u, v = factorise(head.local.detach(), head.start)
    parts = []
    for part in (mean, mean @ v.T, u.T @ mean):
        assert part.norm() > clip
        parts.append(part / part.norm() * clip)
    of_local = (parts[1] @ v + u @ parts[2] + u @ u.T @ parts[1] @ v) / 10
    loss = method.loss(head, IMAGES.features, IMAGES.labels, {})
    found = torch.autograd.grad(loss, [head.ctx, head.local])
    torch.testing.assert_close(found[0], parts[0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found[1], of_local, rtol=1e-3, atol=1e-5)


def moved(**options: Any) -> tuple[Any, Tensor, Tensor]:
    """The head after one step, and by what ctx and local moved, in learning rates."""
    flat = {"dp_fpl.rank": 2, "dp_fpl.clip-norm": 3.0}
    method = make_method("dp_fpl", local_epochs=1, lr=0.5, **flat, **options)
    work = make_work(method, method.build(), IMAGES)
    before = work.head.state()
    local.train(method, [work])
    after = work.head.state()
    return work.head, *((before[n] - after[n]) / method.lr(n, 0, 1) for n in ("ctx", "local"))


def test_noise_has_the_standard_deviation_that_epsilon_counts() -> None:
    _, ctx, of_local = moved(**{"dp_fpl.noise": 0.0})
    head, noised, local_noised = moved(**{"dp_fpl.noise": 50.0})
    std = 50.0 * 3.0 / 8
    assert (noised - ctx).std().item() == pytest.approx(std, rel=0.2)
    # What reaches local lies in the factors: seen through them it is the noise of u and v
    start = make_work(make_method("dp_fpl"), make_method("dp_fpl").build(), IMAGES).head
    u, v = factorise(start.local.detach(), head.start)
    noise = local_noised - of_local
    inside = u @ u.T @ noise + noise @ v.T @ v - u @ u.T @ noise @ v.T @ v
    torch.testing.assert_close(noise, inside, rtol=1e-3, atol=1e-2)
    off_u, off_v = torch.eye(4) - u @ u.T, torch.eye(32) - v.T @ v
    # (4 - 2) 2 entries of u's and 2 (32 - 2) of v's noise, untouched by each other
    assert (u.T @ noise @ off_v).norm().item() == pytest.approx(std * 60**0.5, rel=0.3)
    assert (off_u @ noise @ v.T).norm().item() == pytest.approx(std * 4**0.5, rel=0.8)


def test_released_noise_reaches_local_alone_and_the_server_adds_the_rest() -> None:
    method = make_method("dp_fpl", compat="released")
    head = make_work(method, method.build(), IMAGES).head
    for parameter in (head.ctx, head.local):
        parameter.grad = torch.zeros_like(parameter)
    method.private().add_noise(head.ctx, head.local, head.start, torch.Generator())
    assert (head.ctx.grad == 0).all()
    assert head.local.grad.abs().max() > 0
    state = method.start()
    ctx = torch.zeros_like(state.shared["ctx"])
    method.merge(state, {i: Upload({"ctx": ctx.clone()}, 1) for i in range(4)})
    expected = method.lr("ctx", 0, 2) * method.private().std / 4
    assert state.shared["ctx"].std().item() == pytest.approx(expected, rel=0.2)
    papers = make_method("dp_fpl")
    papers.merge(state, {i: Upload({"ctx": ctx.clone()}, 1) for i in range(4)})
    assert torch.equal(state.shared["ctx"], ctx)


def test_the_memory_of_a_step_can_be_measured() -> None:
    # With gradients by torch.func it raised, and no run could choose how many clients fit
    method = make_method("dp_fpl")
    assert capacity.clients_that_fit(method, make_work(method, method.build(), IMAGES)) >= 1


# In a federation


def test_epsilon_grows_with_the_epochs_and_stands_in_the_rounds(
    federate: Federate, wire: list[Exchange]
) -> None:
    run = federate(method="dp_fpl", num_server_rounds=3, flat={"dp_fpl.noise": 2.0})
    assert {name for e in wire for name in (*e.up, *e.down)} == {"ctx"}
    for record in run.rounds()[1:]:
        # 2 epochs a round, however many steps a client takes in them
        expected = epsilon_of(math.sqrt(2 * record.round) / 2.0, 1e-5)
        assert record.client_metrics == {
            i: {"epsilon": pytest.approx(expected)} for i in range(NUM_CLIENTS)
        }
    kept = [load_file(path) for path in sorted(run.path.rglob("round-00003.safetensors"))]
    assert all(head.keys() == {"ctx", "local", "steps"} for head in kept)
    assert len({int(head["steps"]) for head in kept}) > 1


@pytest.mark.parametrize("options", [{"compat": "released"}, {"flat": {"dp_fpl.noise": 0.0}}])
def test_what_is_not_bounded_is_not_said(options: dict[str, Any], federate: Federate) -> None:
    run = federate(method="dp_fpl", num_server_rounds=1, local_epochs=1, **options)
    assert [record.client_metrics for record in run.rounds()] == [{}, {}]


def test_a_context_of_every_class_has_its_own_factors() -> None:
    method = make_method("dp_fpl", local_epochs=1, **{"prompt.class-specific": True})
    work = make_work(method, method.build(), IMAGES)
    before = work.head.state()
    local.train(method, [work])
    assert work.head.start.shape == (4, 32, 4)
    assert (work.head.local - before["local"]).flatten(1).abs().max(1).values.min() > 0
