"""FedPGP's loss and its gradients, against numbers computed from its public code."""

import functools
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.fedpgp import contrast
from pfedmoap_flwr.runs import checkpoint
from support.federation import Exchange, Federate, make_method, rounds
from support.laws import THREE_ROUNDS
from support.oracle import numbers, oracle
from support.tiny import CLASSNAMES, NUM_CLIENTS

VECTOR = oracle("fedpgp_loss")


@pytest.mark.parametrize(
    "case", VECTOR["cases"], ids=lambda case: f"mu={case['mu']}-temp={case['temp']}"
)
def test_16_loss_and_gradients_are_those_of_the_public_code(case: dict[str, Any]) -> None:
    inputs = VECTOR["inputs"]
    weights = {"fedpgp.mu": case["mu"], "fedpgp.temperature": case["temp"]}
    method = make_method("fedpgp", **weights)
    head = method.build()
    # The oracle's text features in the place of the encoder's
    texts = [numbers(inputs[name]).requires_grad_() for name in ("T0", "Tsigma", "Tfull")]
    head.anchor, shared, personal = texts
    head.encoder = lambda prompt: shared if prompt is head.ctx else F.normalize(personal, dim=-1)
    head.logit_scale = inputs["logit_scale"]
    image, labels = numbers(inputs["image"]), torch.tensor(inputs["labels"])
    near = functools.partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6)
    term = contrast(texts[0], texts[1], texts[2], case["temp"])
    assert term.item() == pytest.approx(case["contrastive"], rel=1e-6)
    assert F.cross_entropy(head(image), labels).item() == pytest.approx(case["ce"], rel=1e-6)
    loss = method.loss(head, image, labels, {})
    assert loss.item() == pytest.approx(case["loss"], rel=1e-6)
    gradients = torch.autograd.grad(loss, texts)
    for gradient, name in zip(gradients, ("grad_T0", "grad_Tsigma", "grad_Tfull"), strict=True):
        near(gradient, numbers(case[name]))


def test_the_personal_prompt_is_the_global_one_plus_a_product_of_rank_r() -> None:
    method = make_method("fedpgp", **{"fedpgp.rank": 2})
    head = method.build()
    assert (head.u.shape, head.v.shape) == ((4, 2), (2, 32))
    for factor in (head.u, head.v):
        assert 0.01 < factor.std() < 0.04
    whole = head.ctx + sum(head.u[:, k, None] * head.v[None, k] for k in range(2))
    torch.testing.assert_close(head.encode(), head.encoder(whole), rtol=1e-4, atol=1e-4)
    every = make_method("fedpgp", **{"prompt.class-specific": True}).build()
    assert (every.u.shape, every.v.shape) == ((4, 4, 4), (4, 4, 32))
    assert every(torch.ones(2, 64)).shape == (2, 4)


def of_open_clip(method: Any, sentence: str) -> Tensor:
    """Unit text features by open_clip's own forward."""
    tokens = open_clip.get_tokenizer("tiny")([
        sentence.format(name.replace("_", " ")) for name in CLASSNAMES
    ])  # fmt: skip
    with torch.no_grad():
        return F.normalize(method.clip.model.encode_text(tokens), dim=-1)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "a drawing of {}."),
        ({"compat": "released"}, "X X X X {}."),
        ({"compat": "released", "prompt.ctx-init": "a photo of"}, "a photo of {}."),
    ],
)
def test_the_positive_is_a_sentence_by_hand_and_as_released_a_row_of_x(
    options: dict[str, Any], sentence: str
) -> None:
    method = make_method("fedpgp", **options)
    anchor = method.build().anchor
    torch.testing.assert_close(anchor, of_open_clip(method, sentence), rtol=1e-4, atol=1e-4)
    others = {"a drawing of {}.", "X X X X {}.", "a photo of {}."} - {sentence}
    for other in others:
        assert (anchor - of_open_clip(method, other)).abs().max() > 1e-2


def test_the_gradient_reaches_all_three_and_the_term_moves_the_global_prompt() -> None:
    images, labels = torch.randn(4, 64), torch.arange(4)

    def gradients(mu: float) -> dict[str, Tensor]:
        method = make_method("fedpgp", **{"fedpgp.mu": mu})
        head = method.build()
        assert not head.anchor.requires_grad
        method.loss(head, images, labels, {}).backward()
        return {name: parameter.grad for name, parameter in head.named_parameters()}

    with_term, without = gradients(1.0), gradients(0.0)
    assert with_term.keys() == {"ctx", "u", "v"}
    for name, gradient in with_term.items():
        assert gradient.any()
        assert (gradient - without[name]).abs().max() > 1e-3 * gradient.abs().max()


def test_sigma_travels_and_the_factors_stay(federate: Federate, wire: list[Exchange]) -> None:
    run = federate(method="fedpgp", num_server_rounds=1)
    assert {name for e in wire for name in (*e.up, *e.down)} == {"ctx"}
    start = make_method("fedpgp").build().state()
    kept = [load_file(path) for path in sorted(run.path.rglob("round-00001.safetensors"))]
    assert len(kept) == NUM_CLIENTS
    for state in kept:
        assert state.keys() == {"ctx", "u", "v"}
        assert all((state[name] - start[name]).abs().max() > 1e-7 for name in state)
    assert (kept[0]["u"] - kept[1]["u"]).abs().max() > 1e-7


@pytest.mark.slow
def test_9_without_factors_and_contrast_it_is_promptfl(
    reference: Federate, federate: Federate
) -> None:
    neutral = {"fedpgp.rank": 0, "fedpgp.mu": 0.0}
    ours = federate("ours", method="fedpgp", flat=neutral, **THREE_ROUNDS)
    theirs = reference(method="promptfl", **THREE_ROUNDS)
    assert rounds(ours) == rounds(theirs)
    assert torch.equal(
        checkpoint.load(ours.path).shared["ctx"], checkpoint.load(theirs.path).shared["ctx"]
    )
    contrasted = federate("contrast", method="fedpgp", flat={"fedpgp.rank": 0}, **THREE_ROUNDS)
    assert rounds(contrasted) != rounds(theirs)


def test_a_temperature_of_0_is_refused() -> None:
    with pytest.raises(UsageError, match=r"fedpgp\.temperature=0: must be > 0"):
        make_method("fedpgp", **{"fedpgp.temperature": 0})
