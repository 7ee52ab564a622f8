"""FedSP: a truncated tower with a layer of the client's own; the prompt moved through the whole."""

from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pfedmoap_flwr.methods.base import PromptHead, Split, Upload
from pfedmoap_flwr.methods.parts.towers import apart, told_to_both
from pfedmoap_flwr.runs import checkpoint
from pfedmoap_flwr.training import local
from support.federation import Exchange, Federate, kept_head, make_method, make_work
from support.laws import THREE_ROUNDS
from support.oracle import numbers
from support.tiny import NUM_CLIENTS

IMAGES = Split(
    torch.randn(6, 64, generator=torch.Generator().manual_seed(0)),
    torch.tensor([0, 1, 2, 3, 0, 1]),
)


def test_at_the_start_a_client_has_the_towers_first_block_alone() -> None:
    method = make_method("fedsp", **{"prompt.ctx-init": "a photo of"})
    head = method.build()
    model: Any = open_clip.create_model("tiny", str(method.clip.checkpoint)).eval()
    # open_clip's own forward of plain words, with a second block that gives back what it got
    model.transformer.resblocks[1].register_forward_hook(lambda block, inputs, output: inputs[0])
    texts = [f"a photo of {name.replace('_', ' ')}." for name in method.task.classnames]
    with torch.no_grad():
        ids = open_clip.get_tokenizer("tiny")(texts)
        expected = F.normalize(model.encode_text(ids), dim=-1)
        torch.testing.assert_close(head.encode(), expected, rtol=1e-4, atol=1e-5)
        assert (PromptHead(method).encode() - expected).abs().max() > 1e-3
    logits = head.logit_scale * F.normalize(IMAGES.features, dim=-1) @ expected.t()
    torch.testing.assert_close(head(IMAGES.features), logits, rtol=1e-4, atol=1e-3)


def test_the_clients_own_layer_is_a_residual() -> None:
    method = make_method("fedsp", **{"fedsp.auxiliary": 3})
    head = method.build()
    before = head.encode()
    up = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    head.load({"up": up})
    moved = before + (before @ head.down).tanh() @ up
    expected = moved / moved.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(head.encode(), expected)
    assert (expected - before).norm(dim=-1).min() > 0.1


def test_the_layer_is_trained_before_the_prompt() -> None:
    method = make_method("fedsp", local_epochs=3, lr=0.02)
    phases = method.schedule(method.build(), 3)
    assert phases == [(3, ("down", "up")), (3, ("ctx",))]
    work = make_work(method, method.build(), IMAGES, method.start().shared)
    start = work.head.state()
    local.train(method, [work], phases[:1])
    first = work.head.state()
    assert torch.equal(first["ctx"], start["ctx"])
    assert not any(torch.equal(first[name], start[name]) for name in ("down", "up"))
    local.train(method, [work], phases[1:])
    second = work.head.state()
    assert not torch.equal(second["ctx"], start["ctx"])
    assert all(torch.equal(second[name], first[name]) for name in ("down", "up"))


def test_apart_by_hand_and_blind_to_what_classes_have_in_common() -> None:
    # Without their means: (1, 0), (-1, 0) and (0, 2), (0, -2); (2, 0), (-2, 0); (-1, 0), (1, 0)
    text, across = numbers([[2, 5], [0, 5]]), numbers([[7, 3], [7, -1]])
    longer, opposite = numbers([[9, 1], [5, 1]]), numbers([[0, 0], [2, 0]])
    assert apart(text, across).item() == pytest.approx(1)
    assert apart(text, longer).item() == pytest.approx(0)
    assert apart(text, opposite).item() == pytest.approx(2)
    # It changes no softmax either
    images = numbers([[0.3, -0.7], [0.9, 0.2]])
    shift = numbers([4, -3])
    torch.testing.assert_close(
        (images @ text.t()).softmax(1), (images @ (text + shift).t()).softmax(1)
    )


def test_a_step_goes_down_the_gradient_of_both_halves() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 4, 5, 3, generator=generator).double().unbind()
    ctx = torch.randn(5, generator=generator).double()

    def tower(weights: Tensor) -> Any:
        return lambda ctx: torch.einsum("cod,o->cd", weights, ctx).tanh()

    whole, part = tower(first), tower(second)

    def centred(text: Tensor) -> Tensor:
        text = text - text.mean(0)
        return text / text.norm(dim=-1, keepdim=True)

    target = centred(part(ctx))

    def loss(ctx: Tensor) -> float:
        cosines = [(centred(read(ctx)) * target).sum(-1).mean().item() for read in (whole, part)]
        return 1 - sum(cosines) / 2

    moved = ctx.clone()
    for _ in range(3):
        # Central differences
        steps = 1e-5 * torch.eye(5).double()
        slopes = [(loss(moved + step) - loss(moved - step)) / 2e-5 for step in steps]
        moved = moved - 0.1 * numbers(slopes)
    torch.testing.assert_close(told_to_both(ctx, whole, part, 3, 0.1), moved, rtol=1e-6, atol=1e-8)
    assert loss(moved) < loss(ctx)
    assert torch.equal(told_to_both(ctx, whole, part, 0, 0.1), ctx)


def test_the_server_averages_and_moves_the_mean_towards_the_whole_tower() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (0.1 * torch.randn(4, 32, generator=generator) for _ in range(2))
    uploads = {0: Upload({"ctx": one}, 1), 1: Upload({"ctx": other}, 3)}
    mean = (one + 3 * other) / 4
    still = make_method("fedsp", **{"fedsp.steps": 0})
    state = still.start()
    still.merge(state, uploads)
    torch.testing.assert_close(state.shared["ctx"], mean)
    assert state.metrics["apart-before"] == state.metrics["apart-after"]
    method = make_method("fedsp", **{"fedsp.steps": 20, "fedsp.server-lr": 0.05})
    state = method.start()
    method.merge(state, uploads)
    moved = state.shared["ctx"]
    with torch.no_grad():
        whole, read = PromptHead(method).encoder, method.build().encoder(mean)
        distances = [apart(whole(ctx), read).item() for ctx in (mean, moved)]
        drift = apart(method.build().encoder(moved), read).item()
    assert [state.metrics[f"apart-{when}"] for when in ("before", "after")] == pytest.approx(
        distances, rel=1e-3
    )
    assert distances[1] < 0.9 * distances[0]
    assert drift < distances[0] - distances[1]


def test_the_prompt_alone_travels_and_the_layer_stays(
    federate: Federate, wire: list[Exchange]
) -> None:
    run = federate(method="fedsp", num_server_rounds=2, local_epochs=1)
    for exchange in wire:
        assert exchange.down.keys() == {"ctx"}
        assert exchange.kind != "train" or exchange.up.keys() == {"ctx"}
    layers = [kept_head(run, client_id)["up"] for client_id in range(NUM_CLIENTS)]
    assert all(layer.any() for layer in layers)
    assert not torch.equal(layers[0], layers[1])
    assert run.rounds()[-1].metrics.keys() == {"apart-before", "apart-after"}


@pytest.mark.slow
def test_9_with_the_whole_tower_and_no_layer_it_is_promptfl(
    reference: Federate, federate: Federate
) -> None:
    neutral = {"fedsp.blocks": 2, "fedsp.auxiliary": 0, "fedsp.steps": 0}
    ours = federate("ours", method="fedsp", flat=neutral, **THREE_ROUNDS)
    theirs = reference(method="promptfl", **THREE_ROUNDS)
    one, other = checkpoint.load(ours.path), checkpoint.load(theirs.path)
    assert torch.equal(one.shared["ctx"], other.shared["ctx"])
    assert [r.train_loss for r in ours.rounds()] == [r.train_loss for r in theirs.rounds()]
