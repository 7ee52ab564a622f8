"""FedRep on a prompt: who moves when, the head's steps by hand, and its neutral point."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pfedmoap_flwr.methods.base import Split, Tensors, Upload
from pfedmoap_flwr.runs import checkpoint
from pfedmoap_flwr.training import local
from support.federation import Exchange, Federate, kept_head, make_method, make_work, rounds
from support.laws import THREE_ROUNDS
from support.tiny import NUM_CLIENTS

# The prompt moves in the last epochs alone, so give it most of them
OVERFITTING = {"fedrep.rep-epochs": 38}


def images(count: int = 12) -> Split:
    features = torch.randn(count, 64, generator=torch.Generator().manual_seed(count))
    return Split(features, torch.arange(count) % 3)


def head_steps(
    head: Any, data: Split, steps: int, lr: float, momentum: float = 0.0, decay: float = 0.0
) -> Tensor:
    """R after full-batch steps of the softmax's well-known gradient, in float64."""
    x = F.normalize(data.features.double(), dim=-1)
    fixed = head.logit_scale * x @ head.encode().detach().double().t()
    residual = head.residual.detach().double().clone()
    speed = torch.zeros_like(residual)
    for _ in range(steps):
        wrong = (fixed + x @ residual.t()).softmax(-1) - F.one_hot(data.labels, 4)
        speed = momentum * speed + wrong.t() @ x / len(x) + decay * residual
        residual -= lr * speed
    return residual


def test_logits_are_the_prompts_and_the_residuals() -> None:
    method = make_method("fedrep")
    head, plain = method.build(), make_method("promptfl").build()
    data = images()
    assert torch.equal(head(data.features), plain(data.features))
    head.residual.data.normal_()
    x = data.features.double() / data.features.double().norm(dim=-1, keepdim=True)
    texts = head.encode().double()
    expected = head.logit_scale * x @ texts.t() + x @ head.residual.double().t()
    torch.testing.assert_close(head(data.features).double(), expected, rtol=1e-4, atol=1e-4)


def test_the_head_moves_first_then_the_prompt() -> None:
    settings = {"fedrep.rep-epochs": 2, "fedrep.head-lr": 0.5}
    method = make_method("fedrep", local_epochs=5, batch_size=32, **settings)
    head, start, data = method.build(), method.build(), images()
    seen: list[dict[str, Tensor]] = []
    loss_of = method.loss

    def noted(head: Any, features: Tensor, labels: Tensor, received: Tensors) -> Tensor:
        seen.append(head.state())
        return loss_of(head, features, labels, received)

    method.loss = noted
    local.train(method, [make_work(method, head, data)])
    assert len(seen) == 5
    assert all(torch.equal(state["ctx"], start.ctx) for state in seen[:4])
    assert not torch.equal(seen[4]["ctx"], start.ctx)
    expected = head_steps(start, data, 3, 0.5)
    torch.testing.assert_close(seen[3]["residual"].double(), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(head.residual, seen[3]["residual"])
    # The prompt's gradient is taken with the head as it is by then
    start.residual.data.copy_(head.residual)
    F.cross_entropy(start(data.features), data.labels).backward()
    assert start.ctx.grad is not None
    stepped = start.ctx.detach() - 0.002 * start.ctx.grad
    torch.testing.assert_close(seen[4]["ctx"], stepped, rtol=1e-5, atol=1e-7)


def test_released_has_momentum_and_decay_of_its_own_code() -> None:
    settings = {"fedrep.rep-epochs": 1, "fedrep.head-lr": 0.5}
    method = make_method("fedrep", compat="released", local_epochs=5, batch_size=32, **settings)
    head, start, data = method.build(), method.build(), images()
    for each in (head, start):
        each.residual.data.fill_(0.5)
    local.train(method, [make_work(method, head, data)])
    expected = head_steps(start, data, 4, 0.5, momentum=0.5, decay=1e-4)
    torch.testing.assert_close(head.residual.double(), expected, rtol=1e-5, atol=1e-6)
    without = head_steps(start, data, 4, 0.5, momentum=0.5)
    assert (without - expected).abs().max() > 5e-5


def test_a_head_is_trained_on_the_last_prompt_before_it_is_measured() -> None:
    method = make_method("fedrep", batch_size=32, **{"fedrep.last-epochs": 3})
    received = {"ctx": torch.randn(4, 32)}
    head, start, data = method.build(), method.build(), images()
    kept = torch.randn(4, 64)
    for each in (head, start):
        each.residual.data.copy_(kept)
    start.load(received)
    # What the client kept of the prompt has no say
    method.adapt(make_work(method, head, data, received))
    assert torch.equal(head.ctx, received["ctx"])
    expected = head_steps(start, data, 3, 1.0)
    torch.testing.assert_close(head.residual.double(), expected, rtol=1e-4, atol=1e-6)
    assert (head.residual - kept).abs().max() > 1e-3


def test_the_prompt_is_averaged_by_images_and_the_head_stays(
    federate: Federate, wire: list[Exchange]
) -> None:
    run = federate(method="fedrep", local_epochs=3, num_server_rounds=2)
    assert {name for e in wire for name in (*e.up, *e.down)} == {"ctx"}
    kept = [kept_head(run, i)["residual"] for i in range(NUM_CLIENTS)]
    assert all(residual.abs().max() > 1e-4 for residual in kept)
    assert (kept[0] - kept[1]).abs().max() > 1e-4
    method = make_method("fedrep")
    state = method.start()
    uploads = {i: Upload({"ctx": torch.full((4, 32), v)}, n) for i, v, n in ((0, 1, 1), (1, 5, 3))}
    method.merge(state, uploads)
    torch.testing.assert_close(state.shared, {"ctx": torch.full((4, 32), 4.0)})


@pytest.mark.slow
def test_9_without_epochs_of_the_head_it_is_promptfl(
    reference: Federate, federate: Federate
) -> None:
    neutral = {"fedrep.rep-epochs": 9, "fedrep.last-epochs": 0}
    ours = federate("ours/run", method="fedrep", flat=neutral, **THREE_ROUNDS)
    theirs = reference(method="promptfl", **THREE_ROUNDS)
    one, other = (checkpoint.load(run.path).shared["ctx"] for run in (ours, theirs))
    assert torch.equal(one, other)
    for record, plain in zip(rounds(ours), rounds(theirs), strict=True):
        assert record["train_loss"] == plain["train_loss"]
        for i, measured in record["clients"].items():
            assert measured["global-accuracy"] == plain["clients"][i]["global-accuracy"]
            # Measured on P_g, where PromptFL's client has its own prompt
            assert measured["personal-accuracy"] == measured["global-accuracy"]
