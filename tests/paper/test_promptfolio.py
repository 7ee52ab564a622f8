"""PromptFolio's mixture of two text features, against numbers computed from its public code."""

import functools
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.runs import checkpoint
from support.federation import Exchange, Federate, make_method, rounds
from support.laws import THREE_ROUNDS
from support.oracle import numbers, oracle
from support.tiny import NUM_CLIENTS

VECTOR = oracle("promptfolio_logits")


@pytest.mark.parametrize("case", VECTOR["cases"], ids=lambda case: f"theta={case['theta']}")
def test_16_logits_loss_and_gradients_are_those_of_the_public_code(case: dict[str, Any]) -> None:
    inputs = VECTOR["inputs"]
    method = make_method("promptfolio", **{"promptfolio.theta": case["theta"]})
    head = method.build()
    # The oracle's text features in the place of the encoder's
    texts = [numbers(inputs[name]).requires_grad_() for name in ("Tglobal", "Tlocal")]
    shared, local = texts
    of_prompt = {id(head.ctx): shared, id(head.local): local}
    head.encoder = lambda prompt: F.normalize(of_prompt[id(prompt)], dim=-1)
    head.logit_scale = inputs["logit_scale"]
    near = functools.partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6)
    norms = head.encode().norm(dim=-1)
    near(norms, numbers(case["mixed_norm"]))
    image, labels = numbers(inputs["image"]), torch.tensor(inputs["labels"])
    near(head(image), numbers(case["logits"]))
    loss = method.loss(head, image, labels, {})
    assert loss.item() == pytest.approx(case["loss"], rel=1e-6)
    gradients = torch.autograd.grad(loss, texts)
    for gradient, name in zip(gradients, ("grad_global", "grad_local"), strict=True):
        near(gradient, numbers(case[name]))


@pytest.mark.parametrize("theta", [0.3, 1.0])
def test_the_head_mixes_unit_features_and_does_not_normalise_again(theta: float) -> None:
    head = make_method("promptfolio", **{"promptfolio.theta": theta}).build()
    images = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    shared, local = (head.encoder(prompt).double() for prompt in (head.ctx, head.local))
    mixed = (1 - theta) * shared + theta * local
    expected = head.logit_scale * F.normalize(images.double(), dim=-1) @ mixed.t()
    torch.testing.assert_close(head(images).double(), expected, rtol=1e-4, atol=1e-4)
    assert (mixed.norm(dim=-1) < 0.999).all() == (theta < 1)


def test_both_prompts_get_a_gradient_by_their_weight() -> None:
    images, labels = torch.randn(4, 64), torch.arange(4)

    def gradients(theta: float) -> dict[str, Tensor]:
        method = make_method("promptfolio", **{"promptfolio.theta": theta})
        head = method.build()
        method.loss(head, images, labels, {}).backward()
        return {name: parameter.grad for name, parameter in head.named_parameters()}

    assert {name: bool(g.any()) for name, g in gradients(0.4).items()} == {
        "ctx": True,
        "local": True,
    }
    assert not gradients(0.0)["local"].any()
    assert not gradients(1.0)["ctx"].any()


def test_the_global_prompt_travels_and_the_local_one_stays(
    federate: Federate, wire: list[Exchange]
) -> None:
    run = federate(method="promptfolio", num_server_rounds=1)
    assert {name for e in wire for name in (*e.up, *e.down)} == {"ctx"}
    start = make_method("promptfolio").build().state()
    kept = [load_file(path) for path in sorted(run.path.rglob("round-00001.safetensors"))]
    assert len(kept) == NUM_CLIENTS
    for state in kept:
        assert all((state[name] - start[name]).abs().max() > 1e-6 for name in ("ctx", "local"))
    assert (kept[0]["local"] - kept[1]["local"]).abs().max() > 1e-6


@pytest.mark.slow
def test_9_without_the_local_prompt_it_is_promptfl(reference: Federate, federate: Federate) -> None:
    neutral = {"promptfolio.theta": 0.0}
    ours = federate("ours", method="promptfolio", flat=neutral, **THREE_ROUNDS)
    theirs = reference(method="promptfl", **THREE_ROUNDS)
    assert torch.equal(
        checkpoint.load(ours.path).shared["ctx"], checkpoint.load(theirs.path).shared["ctx"]
    )
    assert rounds(ours) == rounds(theirs)
    mixed = federate("mixed", method="promptfolio", **THREE_ROUNDS)
    assert rounds(mixed) != rounds(theirs)


def test_a_weight_that_is_no_share_is_refused() -> None:
    with pytest.raises(UsageError, match=r"promptfolio\.theta=1\.5: must be >= 0 and <= 1"):
        make_method("promptfolio", **{"promptfolio.theta": 1.5})
