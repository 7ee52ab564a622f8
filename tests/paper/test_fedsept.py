"""FedSEPT: low-rank experts, the router, what is private and what travels."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.base import Split
from pfedmoap_flwr.methods.fedsept import Router, mean_overlap
from pfedmoap_flwr.methods.parts.privacy import clipped_mean, privatised
from pfedmoap_flwr.training import local, stacked
from support.federation import Exchange, Federate, make_method, make_work, tensor_files
from support.oracle import numbers, oracle
from support.tiny import NUM_CLIENTS, TINY

OVERFITTING = {"lr": 0.05}
VECTOR = oracle("fedsept_experts")
CLOSE: Any = {"rtol": 1e-6, "atol": 1e-6}


def test_16_the_overlap_of_the_experts_and_its_gradient() -> None:
    factors = numbers(VECTOR["context"]["A"]).requires_grad_()
    overlap = mean_overlap(factors)
    torch.testing.assert_close(overlap, numbers(VECTOR["diversity"]["value"]), **CLOSE)
    (gradient,) = torch.autograd.grad(overlap, factors)
    torch.testing.assert_close(gradient, numbers(VECTOR["diversity"]["grad_A"]), **CLOSE)


def oracle_router() -> Router:
    said = VECTOR["router"]["weights"]
    n_experts, width = len(said["head.fc.bias"]), len(said["aggregator.post_ln.bias"])
    router = Router(width, n_experts, torch.Generator()).double()
    value = slice(2 * width, 3 * width)
    router.load_state_dict(
        {
            "value.weight": numbers(said["aggregator.attn.in_proj_weight"])[value],
            "value.bias": numbers(said["aggregator.attn.in_proj_bias"])[value],
            "out.weight": numbers(said["aggregator.attn.out_proj.weight"]),
            "out.bias": numbers(said["aggregator.attn.out_proj.bias"]),
            "norm.weight": numbers(said["aggregator.post_ln.weight"]),
            "norm.bias": numbers(said["aggregator.post_ln.bias"]),
            "head.weight": numbers(said["head.fc.weight"]),
            "head.bias": numbers(said["head.fc.bias"]),
        }
    )
    return router


def test_16_attention_to_one_token_routes_by_its_value() -> None:
    pi = oracle_router()(F.normalize(numbers(VECTOR["router"]["image"]), dim=-1))
    torch.testing.assert_close(pi, numbers(VECTOR["router"]["pi"]), **CLOSE)


class Fixed(nn.Module):
    """A router that has made up its mind."""

    def __init__(self, pi: Tensor) -> None:
        super().__init__()
        self.pi = pi

    def forward(self, image_features: Tensor) -> Tensor:
        torch.testing.assert_close(image_features.norm(dim=-1), torch.ones(2).double())
        return self.pi


def test_16_the_experts_logits_are_mixed_by_the_router() -> None:
    method: Any = make_method("fedsept")
    head = method.build()
    said = VECTOR["router"]
    head.router, head.logit_scale = Fixed(numbers(said["pi"])), said["logit_scale"]
    text = F.normalize(numbers(said["text_per_expert"]), dim=-1)
    logits = head.classify(numbers(said["image"]), text)
    torch.testing.assert_close(logits, numbers(said["mixed_logits"]), **CLOSE)


def test_16_contexts_are_factors_times_basis_plus_residual() -> None:
    method: Any = make_method("fedsept", **{"fedsept.num-experts": 3, "fedsept.rank": 2})
    head = method.build()
    said = {name: numbers(VECTOR["context"][name]) for name in ("A", "B0", "R", "ctx")}
    seen: list[Tensor] = []
    head.encoder = seen.append
    head.factors, head.residual = nn.Parameter(said["A"]), nn.Parameter(said["R"])
    head.basis = said["B0"]
    head.encode()
    torch.testing.assert_close(seen[0].detach(), said["ctx"], **CLOSE)


def per_sample_gradients() -> Tensor:
    """The squared error's gradient (B, 6) of each sample, by hand: 2 (W x + b - y) / 2."""
    said = {k: numbers(v) for k, v in VECTOR["per_sample_clip"].items()}
    error = said["inputs"] @ said["weight"].t() + said["bias"] - said["targets"]
    by_weight = torch.einsum("bo,bi->boi", error, said["inputs"])
    return torch.cat([by_weight.flatten(1), error], dim=1)


def test_16_each_samples_gradient_is_clipped_before_the_mean() -> None:
    said = VECTOR["per_sample_clip"]
    gradients = per_sample_gradients()
    norms = gradients.norm(dim=1)
    scale = numbers(said["sample_norms"]) / norms
    torch.testing.assert_close(scale, scale[0].expand(4), rtol=1e-5, atol=0)
    clipped = clipped_mean(gradients * scale[0], said["clip"])
    expected = torch.cat(
        [numbers(said["clipped_mean_weight"]).flatten(), numbers(said["clipped_mean_bias"])]
    )
    torch.testing.assert_close(clipped, expected, rtol=1e-5, atol=1e-6)


def test_a_short_gradient_is_left_as_it_is() -> None:
    gradients = torch.tensor([[0.3, 0.4], [3.0, 4.0]])
    torch.testing.assert_close(clipped_mean(gradients, 1.0), torch.tensor([0.45, 0.6]))


@pytest.mark.parametrize("noise", [0.5, 3.0])
def test_a_private_gradient_is_the_clipped_mean_plus_the_noise_that_is_due(noise: float) -> None:
    weight = torch.randn(3, 5).double().requires_grad_()
    other = torch.randn(3).double().requires_grad_()
    images, labels = torch.randn(4, 5).double(), torch.tensor([0, 2, 1, 1])

    def losses() -> Tensor:
        return F.cross_entropy(images @ weight.t() + other, labels, reduction="none")

    loss = privatised(losses(), weight, 0.3, noise, torch.Generator().manual_seed(7))
    plain = losses().mean()
    assert loss.item() == pytest.approx(plain.item())
    found, of_other = torch.autograd.grad(loss, (weight, other))
    torch.testing.assert_close(of_other, torch.autograd.grad(plain, other)[0])
    each = [torch.autograd.grad(losses()[i], weight)[0] for i in range(4)]
    each = [gradient * min(1.0, 0.3 / gradient.norm().item()) for gradient in each]
    drawn = torch.randn(3, 5, generator=torch.Generator().manual_seed(7)).double()
    torch.testing.assert_close(found, torch.stack(each).mean(0) + noise * 0.3 / 4 * drawn)


def test_private_the_factors_alone_have_another_gradient() -> None:
    features, labels = torch.randn(4, 64), torch.tensor([0, 1, -100, 3])

    def gradients(**settings: Any) -> dict[str, Tensor]:
        keys = {f"fedsept.{name}": value for name, value in settings.items()}
        made: Any = make_method("fedsept", **keys)
        head = make_work(made, made.build()).head
        loss = made.loss(head, features, labels, {})
        names = [name for name, _ in head.named_parameters()]
        found = torch.autograd.grad(loss, list(head.parameters()))
        return dict(zip(names, found, strict=True))

    plain = gradients(private=False)
    # Nothing is clipped and there is no noise: all is as without privacy
    torch.testing.assert_close(
        gradients(private=True, clip=1e9, noise=0.0), plain, rtol=1e-3, atol=1e-5
    )
    tight = gradients(private=True, clip=1e-3, noise=0.0)
    # A mean of clipped gradients is no longer than the clip
    assert tight.pop("factors").norm() <= 1e-3 * (1 + 1e-4)
    assert plain.pop("factors").norm() > 1e-2
    torch.testing.assert_close(tight, plain, rtol=1e-3, atol=1e-5)


def test_noise_is_a_function_of_seed_client_and_round() -> None:
    made: Any = make_method("fedsept", **{"fedsept.private": True}, local_epochs=1)
    images = Split(torch.randn(8, 64), torch.arange(8) % 4)

    def factors(client_id: int, server_round: int) -> Tensor:
        work = make_work(made, made.build(), images, {}, client_id, server_round)
        local.train(made, [work])
        trained: Tensor = work.head.factors.detach()
        return trained

    again = factors(0, 1)
    assert torch.equal(factors(0, 1), again)
    assert not torch.equal(factors(1, 1), again)
    assert not torch.equal(factors(0, 2), again)


def test_the_factors_travel_and_the_rest_stays(federate: Federate, wire: list[Exchange]) -> None:
    run = federate(method="fedsept", num_server_rounds=1)
    assert {name for e in wire for name in (*e.up, *e.down)} == {"factors"}
    assert wire[-1].down["factors"].shape == (4, TINY["prompt.n-ctx"], 16)
    start = dict(make_method("fedsept").build().named_parameters())
    heads = [load_file(path) for path in sorted(run.path.rglob("round-00001.safetensors"))]
    assert len(heads) == NUM_CLIENTS
    for head in heads:
        for name in ("factors", "residual", "router.value.weight", "router.head.weight"):
            assert (head[name] - start[name]).abs().max() > 1e-7, name
    assert (heads[0]["residual"] - heads[1]["residual"]).abs().max() > 1e-6


def test_privacy_does_not_depend_on_how_many_at_once(federate: Federate) -> None:
    noisy = {"method": "fedsept", "num_server_rounds": 1, "flat": {"fedsept.private": True}}
    runs = [federate(f"{n}/run", clients_at_once=n, **noisy) for n in (1, 2)]
    assert tensor_files(runs[0]) == tensor_files(runs[1])


def test_one_expert_is_refused() -> None:
    with pytest.raises(UsageError, match=r"fedsept.num-experts=1: must be >= 2"):
        make_method("fedsept", **{"fedsept.num-experts": 1})


def test_private_clients_are_not_stacked() -> None:
    made: Any = make_method("fedsept", **{"fedsept.private": True})
    images = Split(torch.randn(8, 64), torch.arange(8) % 4)
    works = [make_work(made, made.build(), images, {}, client_id) for client_id in range(2)]
    with pytest.raises(RuntimeError):
        stacked.check_stackable(stacked.Stack(made, works), *local.first_images(works, 2))
