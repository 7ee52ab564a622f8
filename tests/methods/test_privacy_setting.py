"""privacy.unit=example: each image's gradient is clipped and each step noised, or it is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pfedmoap_flwr import methods
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.base import Split
from pfedmoap_flwr.methods.parts.privacy import epsilon_after
from pfedmoap_flwr.training import local
from support.federation import Exchange, Federate, assert_same, make_method, make_work
from support.works import SHAPES

EXAMPLE = {"privacy.unit": "example"}
SUITED = (
    *("coop", "feddda", "fedotp", "fedper", "fedrep", "fedsp", "pfedla", "pfedmoap"),
    *("pfedprompt", "pfedpt", "promptfl", "promptfl_ft", "promptfolio"),
)


def split(count: int) -> Split:
    generator = torch.Generator().manual_seed(3)
    return Split(torch.randn(count, 64, generator=generator), torch.arange(count) % 4)


def taken(name: str, **options: float) -> tuple[Any, dict[str, Tensor]]:
    """A head before its only step, and what that step took of it, in learning rates."""
    method = make_method(name, local_epochs=1, batch_size=8, lr=0.5, **EXAMPLE, **options)
    head = method.build()
    before = head.state()
    work = make_work(method, head, split(6))
    phases = [(1, tuple(name for name, _ in head.named_parameters()))]
    local.train(method, [work], phases)
    rates = {n: method.lr(n, 0, 1) for n, _ in head.named_parameters()}
    moved = {n: (before[n] - t) / rates[n] for n, t in head.state().items() if n in rates}
    head.load(before)
    return head, moved


def by_hand(head: Any, images: Split, clip: float) -> dict[str, Tensor]:
    """Image by image: the gradients to all that is learned, clipped together, their sum / 8."""
    named = dict(head.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in named.items()}
    for i in range(len(images)):
        loss = F.cross_entropy(head(images.features[i : i + 1]), images.labels[i : i + 1])
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        gradients = {n: g for n, g in zip(named, found, strict=True) if g is not None}
        length = sum(float(g.double().square().sum()) for g in gradients.values()) ** 0.5
        for name, gradient in gradients.items():
            total[name] += gradient * min(1.0, clip / length) / 8
    return total


@pytest.mark.parametrize("name", ["promptfl", "fedper", "pfedmoap"])
@pytest.mark.parametrize("clip", [0.3, 1e6])
def test_a_step_takes_the_sum_of_clipped_gradients(name: str, clip: float) -> None:
    head, moved = taken(name, **{"privacy.clip-norm": clip, "privacy.noise": 0.0})
    expected = by_hand(head, split(6), clip)
    assert moved.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(
            moved[key], tensor.detach(), rtol=1e-3, atol=1e-5 * max(clip, 1) ** 0.5
        )


def test_noise_reaches_all_that_moves_and_counts_in_clip_norms() -> None:
    options = {"privacy.clip-norm": 2.0}
    _, quiet = taken("pfedmoap", **options, **{"privacy.noise": 0.0})
    _, loud = taken("pfedmoap", **options, **{"privacy.noise": 30.0})
    assert {n.partition(".")[0] for n in loud} == {"ctx", "gate"}
    for name, tensor in loud.items():
        if tensor.numel() > 50:
            std = (tensor - quiet[name]).std().item()
            assert std == pytest.approx(30.0 * 2.0 / 8, rel=0.25), name


def test_no_noise_is_drawn_twice_in_a_round() -> None:
    seen: list[Tensor] = []
    method = make_method("fedrep", **EXAMPLE)
    work = make_work(method, method.build(), split(12))
    phases = method.schedule(work.head, 2)
    assert len(phases) == 2
    for _, names in phases:
        groups = [{"name": n, "params": [p]} for n, p in work.head.named_parameters() if n in names]
        optimizer = method.optimizer(work, groups)
        for _ in range(2):
            for group in groups:
                group["params"][0].grad = torch.zeros_like(group["params"][0])
            optimizer.step()
            seen += [group["params"][0].grad.flatten()[:8] for group in groups]
    assert torch.stack(seen).unique(dim=0).shape[0] == len(seen) >= 4


def test_who_suits_is_known() -> None:
    for name in methods.names():
        if name in SUITED:
            make_method(name, **EXAMPLE)
        else:
            with pytest.raises(
                UsageError, match=r"privacy\.unit='example' cannot be used"
            ) as raised:
                make_method(name, **EXAMPLE)
            assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", SUITED)
def test_an_image_has_no_say_in_anothers_logits(name: str) -> None:
    method = make_method(name, **EXAMPLE)
    generator = torch.Generator().manual_seed(1)
    features = torch.randn((5, *SHAPES[method.reads(method.own).kind]), generator=generator)
    head = make_work(method, method.build(), Split(features, torch.arange(5) % 4)).head.train()
    alone = torch.cat([head(image[None]) for image in features])
    torch.testing.assert_close(head(features), alone, rtol=1e-4, atol=1e-4)


def test_a_federation_counts_epochs_and_repeats(federate: Federate, wire: list[Exchange]) -> None:
    options = {"method": "pfedmoap", "local_epochs": 2, "flat": {**EXAMPLE, "privacy.noise": 3.0}}
    run = federate("one/run", **options)
    expected = [epsilon_after(2 * number, 3.0, 1e-5) for number in (1, 2)]
    assert [r.metrics["epsilon"] for r in run.rounds()[1:]] == pytest.approx(expected)
    for exchange in wire:
        if exchange.kind == "train":
            assert set(exchange.reply.content["metrics"]) == {"client", "num-examples"}
    assert_same(run, federate("two/run", **options))
