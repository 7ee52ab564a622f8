"""FedCLIP: the attention adapter on raw features, its contrastive loss, what travels."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.base import ServerState, Split, Upload
from pfedmoap_flwr.methods.fedclip import FedCLIP
from pfedmoap_flwr.methods.parts.adapters import AttentionAdapter
from pfedmoap_flwr.training import local
from support.federation import Exchange, Federate, make_method, make_work
from support.oracle import numbers, oracle
from support.tiny import NUM_CLIENTS

# Two images of one class are each other's negatives, which leaves at least log 2 of the loss
OVERFITTING = {"fedclip.adapter-lr": 0.01, "fedclip.decay": 0.0, "fedclip.same-class": "ignored"}
VECTOR = oracle("fedmp_adapter")["adapter"]


def oracle_head(method: FedCLIP) -> Any:
    """A head with the weights, texts and scale of the oracle; a class for each of its images."""
    head = method.build().double()
    width = len(VECTOR["image"][0])
    head.adapter = AttentionAdapter(width, torch.Generator()).double()
    named = {"inner": "0", "outer": "2"}
    weights = {
        f"{name}.{kind}": numbers(VECTOR["weights"][f"{number}.{kind}"])
        for name, number in named.items()
        for kind in ("weight", "bias")
    }
    head.adapter.load_state_dict(weights)
    head.text_features = numbers(VECTOR["text_with_residual_unit"])
    head.logit_scale = VECTOR["logit_scale"]
    return head


def test_16_adapter_loss_and_gradient_are_those_of_the_public_code() -> None:
    method: Any = make_method("fedclip")
    head = oracle_head(method)
    images, labels = numbers(VECTOR["image"]), torch.arange(3)
    adapted = F.normalize(head.adapter(images), dim=-1)
    torch.testing.assert_close(adapted, numbers(VECTOR["adapted_unit_image"]), rtol=1e-6, atol=1e-7)
    loss = method.loss(head, images, labels, {})
    torch.testing.assert_close(loss, numbers(VECTOR["loss"]), rtol=1e-6, atol=1e-7)
    (gradient,) = torch.autograd.grad(loss, head.adapter.inner.weight)
    expected = numbers(VECTOR["grad_first_linear"])
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)
    # On unit-norm features it would be another adapter
    other = F.normalize(head.adapter(F.normalize(images, dim=-1)), dim=-1)
    assert (other - adapted).abs().max() > 1e-2


@pytest.mark.parametrize("same_class", ["negative", "ignored"])
def test_images_of_one_class_are_negatives_or_nothing(same_class: str) -> None:
    method: Any = make_method("fedclip", **{"fedclip.same-class": same_class})
    head = oracle_head(method)
    images, labels = numbers(VECTOR["image"]), torch.tensor([2, 0, 2])
    loss = method.loss(head, images, labels, {})
    pairs = head(images)[:, labels]
    terms = []
    for matrix in (pairs, pairs.t()):
        for i in range(3):
            others = [j for j in range(3) if j == i or same_class == "negative" or {i, j} != {0, 2}]
            terms.append(matrix[i, others].logsumexp(0) - matrix[i, i])
    torch.testing.assert_close(loss, torch.stack(terms).mean())


@pytest.mark.parametrize("same_class", ["negative", "ignored"])
def test_rows_that_fill_up_a_batch_are_nobodys_negatives(same_class: str) -> None:
    method: Any = make_method("fedclip", **{"fedclip.same-class": same_class})
    head = method.build()
    images, labels = torch.randn(6, 64), torch.tensor([0, 2, 2, -100, 1, -100])
    real = labels >= 0
    loss = method.loss(head, images, labels, {})
    alone = method.loss(head, images[real], labels[real], {})
    torch.testing.assert_close(loss, alone)
    gradients = torch.autograd.grad(loss, list(head.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_single_image_teaches_nothing() -> None:
    method: Any = make_method("fedclip")
    head = method.build()
    loss = method.loss(head, torch.randn(1, 64), torch.tensor([1]), {})
    assert loss.item() == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, list(head.parameters())))


def test_adam_has_the_papers_settings_and_moves_the_adapter_alone() -> None:
    method: Any = make_method("fedclip", local_epochs=1)
    head = method.build()
    before = {name: p.detach().clone() for name, p in head.named_parameters()}
    text = head.text_features.clone()
    images = Split(torch.randn(8, 64), torch.arange(8) % 4)
    work = make_work(method, head, images)
    groups = [{"name": n, "params": [p]} for n, p in head.named_parameters()]
    defaults = method.optimizer(work, groups).defaults
    assert (defaults["betas"], defaults["eps"]) == ((0.9, 0.98), 1e-6)
    assert defaults["weight_decay"] == 0.2
    local.train(method, [work])
    for name, parameter in head.named_parameters():
        # Adam's first step has one size, whatever the gradient
        moved = (parameter - before[name]).abs().max().item()
        assert moved == pytest.approx(5e-5, rel=0.05)
    assert torch.equal(head.text_features, text)


def test_the_server_takes_the_plain_mean() -> None:
    method = make_method("fedclip")
    state = ServerState({"adapter.inner.bias": torch.zeros(2)})
    name = "adapter.inner.bias"
    uploads = {0: Upload({name: torch.ones(2)}, 1), 1: Upload({name: torch.full((2,), 3.0)}, 9)}
    method.merge(state, uploads)
    assert state.shared[name].tolist() == [2, 2]


def test_the_adapter_is_all_that_travels(federate: Federate, wire: list[Exchange]) -> None:
    federate(method="fedclip", num_server_rounds=1)
    names = {
        f"adapter.{layer}.{kind}" for layer in ("inner", "outer") for kind in ("weight", "bias")
    }
    trained = [e for e in wire if e.kind == "train"]
    assert len(trained) == NUM_CLIENTS
    for exchange in trained:
        assert exchange.up.keys() == exchange.down.keys() == names
        assert any(not torch.equal(exchange.up[n], exchange.down[n]) for n in names)


def test_a_rate_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match=r"fedclip.adapter-lr=0.0: must be > 0"):
        make_method("fedclip", **{"fedclip.adapter-lr": 0.0})
