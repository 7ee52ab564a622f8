"""Bayesian Prompt Learning: the drawn bias, loss and prediction, both forms, what travels."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.base import Split, Tensors
from pfedmoap_flwr.methods.parts.variational import Constant, draws_of
from pfedmoap_flwr.training import local, stacked
from support.federation import Exchange, Federate, kept_head, make_method, make_work
from support.oracle import numbers, oracle
from support.tiny import NUM_CLIENTS
from support.works import assert_stacked_as_alone, made_works

# Draws as wide as N(0, 1) drown a small text tower, and the divergence asks for that width
OVERFITTING = {"bayes_prompt.log-var": -10.0, "bayes_prompt.beta": 0.0, "lr": 0.02}
VECTOR = oracle("bayes_prompt")
INPUTS, OUTPUTS = VECTOR["inputs"], VECTOR["outputs"]
CLOSE: Any = {"rtol": 1e-5, "atol": 1e-6}
IMAGES = Split(torch.randn(6, 64, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 4)
CONDITIONAL = {"bayes_prompt.conditional": True, "bayes_prompt.samples": 3}


def oracle_head(method: Any, text: Tensor) -> Any:
    """A head with the distribution, scale and drawn text features of the oracle."""
    head = method.build()
    head.bias.mu = Constant(numbers(INPUTS["mu"])[0])
    head.bias.log_var = Constant(numbers(INPUTS["logvar"])[0])
    head.logit_scale = INPUTS["logit_scale"]
    head.encode = lambda: F.normalize(text, dim=-1)[None]
    return head


@pytest.mark.parametrize("compat", ["paper", "released"])
def test_16_loss_and_gradient_are_those_of_the_public_code(compat: str) -> None:
    weight = INPUTS["kl_weight"]
    method = make_method("bayes_prompt", compat=compat, **{"bayes_prompt.beta": weight})
    text = numbers(INPUTS["text"]).requires_grad_()
    head = oracle_head(method, text)
    images, labels = numbers(INPUTS["image"]), torch.tensor(INPUTS["labels"])
    loss = method.loss(head, images, labels, {})
    # The public code averages over the dimensions
    kl = OUTPUTS["kl"][0] if compat == "released" else OUTPUTS["kl_summed"]
    torch.testing.assert_close(loss, numbers(OUTPUTS["task_loss"] + weight * kl), **CLOSE)
    if compat == "released":
        torch.testing.assert_close(loss, numbers(OUTPUTS["loss"][0]), **CLOSE)
    (gradient,) = torch.autograd.grad(loss, text)
    torch.testing.assert_close(gradient, numbers(OUTPUTS["grad_text"]), **CLOSE)


def test_16_the_bias_and_the_prediction_are_those_of_the_public_code() -> None:
    mu, log_var, eps = (numbers(INPUTS[name]) for name in ("mu", "logvar", "eps"))
    torch.testing.assert_close(draws_of(mu, log_var, eps), numbers(OUTPUTS["bias"]), **CLOSE)
    head = oracle_head(make_method("bayes_prompt"), numbers(INPUTS["text"])).eval()
    found = head.predict(numbers(INPUTS["image"]), head.encode())
    torch.testing.assert_close(found, numbers(OUTPUTS["test_log_probability"]), **CLOSE)


@pytest.mark.parametrize("class_specific", [False, True])
def test_one_bias_is_added_to_all_context_tokens(class_specific: bool) -> None:
    method = make_method("bayes_prompt", **{"prompt.class-specific": class_specific})
    head = method.build()
    seen: list[Tensor] = []

    class Seeing:
        embed_dim = 64

        def __call__(self, contexts: Tensor) -> Tensor:
            seen.append(contexts)
            return contexts.new_zeros(1, 5, 4, 64)

    head.encoder = Seeing()
    with torch.no_grad():
        head.eps.normal_()
        head.encode()
        head.eval().encode()
    for contexts, eps in zip(seen, (head.eps, head.draws), strict=True):
        added = (contexts - head.ctx)[0]
        assert added.shape == (5, *head.ctx.shape)
        sigma = (head.bias.log_var.value / 2).exp()
        for drawn, e in zip(added, eps, strict=True):
            expected = (head.bias.mu.value + sigma * e).expand(head.ctx.shape)
            torch.testing.assert_close(drawn, expected, rtol=1e-5, atol=1e-6)


def test_the_distribution_starts_as_in_the_public_code() -> None:
    bias = make_method("bayes_prompt").build().bias
    assert not bias.mu.value.any()
    assert bias.log_var.value.min() >= 0
    assert 0.9 < bias.log_var.value.max() <= 1
    lower = make_method("bayes_prompt", **{"bayes_prompt.log-var": -4.0}).build().bias
    torch.testing.assert_close(lower.log_var.value, bias.log_var.value - 4)


def conditional(**changes: Any) -> tuple[Any, Any]:
    """A method of the conditional form with a head whose draws are not 0."""
    method = make_method("bayes_prompt", **CONDITIONAL, **changes)
    head = method.build()
    nn.init.normal_(head.eps, generator=torch.Generator().manual_seed(2))
    return method, head


def test_every_image_has_prompts_of_its_own() -> None:
    method, head = conditional(**{"bayes_prompt.beta": 0.3})
    x = F.normalize(IMAGES.features, dim=-1)
    rows, kls = [], []
    for image in x:
        mu, log_var = head.bias.mu(image[None])[0], head.bias.log_var(image[None])[0]
        sigma = (log_var / 2).exp()
        each = []
        for eps in head.eps:
            text = head.encoder(head.ctx + mu + sigma * eps)
            each.append((head.logit_scale * text @ image).softmax(-1))
        rows.append(torch.stack(each).mean(0).log())
        kls.append(kl_divergence(Normal(mu, sigma), Normal(0.0, 1.0)).sum())
    assert torch.stack(kls).std() > 1e-3
    expected = torch.stack(rows)
    torch.testing.assert_close(head(IMAGES.features), expected, rtol=1e-3, atol=1e-3)
    task = -expected[torch.arange(6), IMAGES.labels].mean()
    loss = method.loss(head, IMAGES.features, IMAGES.labels, {})
    torch.testing.assert_close(loss, task + 0.3 * torch.stack(kls).mean(), rtol=1e-3, atol=1e-3)


def test_rows_that_fill_up_a_batch_have_no_divergence() -> None:
    method, head = conditional(**{"bayes_prompt.beta": 0.3})
    labels = IMAGES.labels.clone()
    labels[[1, 4]] = -100
    real = labels >= 0
    loss = method.loss(head, IMAGES.features, labels, {})
    alone = method.loss(head, IMAGES.features[real], labels[real], {})
    torch.testing.assert_close(loss, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("prompts", "images"), [(1, 1), (24, 2), (60, 5), (72, 6)])
def test_no_more_prompts_than_allowed_are_encoded_at_once(prompts: int, images: int) -> None:
    method, head = conditional(**{"bayes_prompt.prompts": prompts})
    whole, twin = conditional()
    seen: list[int] = []
    encoder = head.encoder

    class Counting:
        classnames, embed_dim, width = encoder.classnames, encoder.embed_dim, encoder.width

        def __call__(self, contexts: Tensor) -> Tensor:
            seen.append(len(contexts))
            return encoder(contexts)

    head.encoder = Counting()
    losses = []
    for made, own in ((method, head), (whole, twin)):
        losses.append(made.loss(own, IMAGES.features, IMAGES.labels, {}))
        losses[-1].backward()
    assert max(seen) == images
    # A part of several is encoded on the way forth and again on the way back
    assert sum(seen) == (6 if images == 6 else 12)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    for one, other in zip(head.parameters(), twin.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-6)


def conditional_works(prompts: int) -> tuple[Any, list[Any]]:
    """Clients with conditional heads, and so many prompts at once."""
    changes = {**CONDITIONAL, "bayes_prompt.log-var": -4.0, "bayes_prompt.prompts": prompts}
    method = make_method("bayes_prompt", local_epochs=1, **changes)
    return method, made_works(method)


def test_conditional_heads_train_stacked_as_each_alone() -> None:
    method, _ = conditional_works(512)
    assert_stacked_as_alone(method, rtol=1e-3, atol=1e-5)


def test_parts_are_refused_loudly_where_heads_are_stacked() -> None:
    # Or clients would be trained on wrong gradients, instead of one by one
    method, works = conditional_works(24)
    losses = stacked.Stack(method, works).losses(*local.first_images(works, 6))
    with pytest.raises(RuntimeError, match="vmap"):
        losses.sum().backward()


def test_every_step_draws_anew() -> None:
    method = make_method("bayes_prompt", batch_size=3)
    seen: list[Tensor] = []
    loss_of = method.loss

    def noted(head: Any, features: Tensor, labels: Tensor, received: Tensors) -> Tensor:
        seen.append(head.eps.detach().clone())
        return loss_of(head, features, labels, received)

    method.loss = noted
    for client_id in (0, 1):
        local.train(method, [make_work(method, method.build(), IMAGES, client_id=client_id)])
    assert len({tuple(eps.flatten().tolist()) for eps in seen}) == len(seen) == 8


def test_9_without_width_and_divergence_it_is_promptfl() -> None:
    options = {"bayes_prompt.log-var": -80.0, "bayes_prompt.beta": 0.0}
    method, plain = make_method("bayes_prompt", **options), make_method("promptfl")
    loss = method.loss(method.build(), IMAGES.features, IMAGES.labels, {})
    expected = plain.loss(plain.build(), IMAGES.features, IMAGES.labels, {})
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", [False, True])
def test_the_context_and_the_distribution_travel(
    form: bool, federate: Federate, wire: list[Exchange]
) -> None:
    flat = {**CONDITIONAL, "bayes_prompt.conditional": form}
    run = federate(
        method="bayes_prompt", num_server_rounds=1, local_epochs=1, batch_size=24, flat=flat
    )
    layers = [
        f"{layer}.{kind}" for layer in ("first", "second", "last") for kind in ("weight", "bias")
    ]
    of = layers if form else ["value"]
    names = {"ctx", *(f"bias.{which}.{name}" for which in ("mu", "log_var") for name in of)}
    trained = [e for e in wire if e.kind == "train"]
    assert len(trained) == NUM_CLIENTS
    for exchange in trained:
        assert exchange.up.keys() == exchange.down.keys() == names
        kept = kept_head(run, exchange.client)
        for name in names:
            assert not torch.equal(exchange.up[name], exchange.down[name])
            assert torch.equal(exchange.up[name], kept[name])


def test_no_draws_are_refused() -> None:
    with pytest.raises(UsageError, match=r"bayes_prompt.samples=0: must be >= 1"):
        make_method("bayes_prompt", **{"bayes_prompt.samples": 0})
