"""FedPer on a prompt: which tokens are shared, which stay, and its two neutral points."""

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.base import Upload
from pfedmoap_flwr.runs import checkpoint
from pfedmoap_flwr.runs.folder import RunFolder
from support.federation import Exchange, Federate, make_method, rounds
from support.laws import THREE_ROUNDS
from support.tiny import NUM_CLIENTS


def kept_heads(run: RunFolder, server_round: int) -> list[dict[str, Tensor]]:
    files = sorted(run.path.rglob(f"round-{server_round:05d}.safetensors"))
    return [load_file(path) for path in files]


@pytest.mark.parametrize(
    ("n_ctx", "fraction", "shared"),
    [(4, 0.5, 2), (5, 0.5, 3), (7, 0.5, 4), (5, 0.3, 2), (3, 0.1, 0), (4, 0.0, 0), (4, 1.0, 4)],
)
def test_the_first_tokens_are_shared(n_ctx: int, fraction: float, shared: int) -> None:
    tokens = {"prompt.n-ctx": n_ctx, "fedper.shared-fraction": fraction}
    head = make_method("fedper", **tokens).build()
    whole = make_method("promptfl", **{"prompt.n-ctx": n_ctx}).build().ctx
    assert torch.equal(head.ctx, whole[:shared])
    assert torch.equal(head.local, whole[shared:])
    features = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    expected = make_method("promptfl", **{"prompt.n-ctx": n_ctx}).build()(features)
    torch.testing.assert_close(head(features), expected)


def test_contexts_of_every_class_and_of_words_are_cut_too() -> None:
    head = make_method("fedper", **{"prompt.class-specific": True}).build()
    assert head.ctx.shape == head.local.shape == (4, 2, 32)
    assert head(torch.ones(2, 64)).shape == (2, 4)
    method = make_method("fedper", **{"prompt.ctx-init": "a photo of a"})
    head = method.build()
    assert torch.equal(torch.cat([head.ctx, head.local]), method.clip.embed("a photo of a"))


def test_all_tokens_are_trained_together() -> None:
    method = make_method("fedper")
    head, whole = method.build(), make_method("promptfl").build()
    images, labels = torch.randn(4, 64), torch.arange(4)
    method.loss(head, images, labels, {}).backward()
    make_method("promptfl").loss(whole, images, labels, {}).backward()
    torch.testing.assert_close(torch.cat([head.ctx.grad, head.local.grad]), whole.ctx.grad)
    assert head.ctx.grad.any()
    assert head.local.grad.any()


def test_the_shared_tokens_alone_travel_and_are_averaged(
    federate: Federate, wire: list[Exchange]
) -> None:
    run = federate(method="fedper", num_server_rounds=1)
    for exchange in wire:
        assert {n: tuple(t.shape) for n, t in exchange.down.items()} == {"ctx": (2, 32)}
    trained = [exchange for exchange in wire if exchange.kind == "train"]
    assert [{n: tuple(t.shape) for n, t in e.up.items()} for e in trained] == [
        {"ctx": (2, 32)}
    ] * NUM_CLIENTS
    start = make_method("fedper").build().state()
    kept = kept_heads(run, 1)
    assert len(kept) == NUM_CLIENTS
    for state in kept:
        assert all((state[name] - start[name]).abs().max() > 1e-6 for name in ("ctx", "local"))
    assert (kept[0]["local"] - kept[1]["local"]).abs().max() > 1e-6


def test_the_mean_is_weighted_by_the_number_of_images() -> None:
    method = make_method("fedper")
    state = method.start()
    sent = {i: Upload({"ctx": torch.full((2, 32), v)}, n) for i, v, n in ((0, 1.0, 1), (1, 5.0, 3))}
    method.merge(state, sent)
    torch.testing.assert_close(state.shared, {"ctx": torch.full((2, 32), 4.0)})


@pytest.mark.slow
@pytest.mark.parametrize("compat", ["paper", "released"])
def test_9_with_every_token_shared_it_is_promptfl(
    compat: str, reference: Federate, federate: Federate
) -> None:
    options = {**THREE_ROUNDS, "compat": compat}
    every = {"fedper.shared-fraction": 1.0}
    ours = federate("ours", method="fedper", flat=every, **options)
    theirs = reference(method="promptfl", **options)
    assert rounds(ours) == rounds(theirs)
    assert torch.equal(
        checkpoint.load(ours.path).shared["ctx"], checkpoint.load(theirs.path).shared["ctx"]
    )


@pytest.mark.slow
def test_9_with_every_token_personal_it_is_coop(reference: Federate, federate: Federate) -> None:
    ours = federate("ours", method="fedper", flat={"fedper.shared-fraction": 0.0}, **THREE_ROUNDS)
    theirs = reference(method="coop", **THREE_ROUNDS)
    assert rounds(ours) == rounds(theirs)
    pairs = list(zip(kept_heads(ours, 3), kept_heads(theirs, 3), strict=True))
    assert len(pairs) == 3
    for own, other in pairs:
        assert torch.equal(own["local"], other["ctx"])


def test_a_share_above_all_is_refused() -> None:
    with pytest.raises(UsageError, match=r"fedper\.shared-fraction=2: must be >= 0 and <= 1"):
        make_method("fedper", **{"fedper.shared-fraction": 2})
