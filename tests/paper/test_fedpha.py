"""FedPHA: projection and loss against numbers of its public code; prompts of several lengths."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from pfedmoap_flwr.clip.text import PromptEncoder
from pfedmoap_flwr.methods.base import Split
from pfedmoap_flwr.methods.fedpha import align, project
from pfedmoap_flwr.training import local, stacked
from support.federation import Exchange, Federate, make_method, make_work
from support.oracle import numbers, oracle
from support.texts import layout
from support.tiny import NUM_CLIENTS

VECTOR = oracle("fedpha_loss")
SHORT = {"fedpha.shortest": 1}
IMAGES = Split(
    torch.randn(6, 64, generator=torch.Generator().manual_seed(0)),
    torch.tensor([0, 1, 2, 3, 0, 1]),
)


@pytest.mark.parametrize("case", VECTOR["projection"]["cases"][:2], ids=lambda c: str(c["ratio"]))
def test_16_the_projection_is_that_of_the_public_code(case: dict[str, Any]) -> None:
    found = project(numbers(case["local_ctx"]), numbers(case["global_ctx"]), case["kept_columns"])
    torch.testing.assert_close(found, numbers(case["projected_local"]), rtol=1e-4, atol=1e-4)
    projector = project(
        torch.eye(case["d"]).double(), numbers(case["global_ctx"]), case["kept_columns"]
    )
    assert projector.trace().item() == pytest.approx(case["projector_trace"])


def test_16_as_many_vectors_are_kept_as_in_the_public_code() -> None:
    case = VECTOR["projection"]["cases"][2]
    method = make_method("fedpha", **{"prompt.n-ctx": case["n_ctx"], "fedpha.ratio": case["ratio"]})
    assert method.build().kept == case["kept_columns"] == 13
    # There 5 (1 - 0.8) is rounded down to 0
    assert VECTOR["projection"]["cases"][0]["cutoff"] == 0
    assert make_method("fedpha", **{"prompt.n-ctx": 5}).build().kept == 4


@pytest.mark.parametrize("case", VECTOR["loss"]["cases"], ids=lambda c: f"alpha={c['alpha']}")
def test_16_the_loss_and_its_gradients_are_those_of_the_public_code(case: dict[str, Any]) -> None:
    inputs = VECTOR["loss"]["inputs"]
    raw = [numbers(inputs[n]).requires_grad_() for n in ("Tglobal", "Tlocal", "Tprojected")]
    text = [F.normalize(t, dim=-1) for t in raw]
    labels = torch.tensor(inputs["labels"])
    images = numbers(inputs["image"])
    head = make_method("fedpha").build()
    head.logit_scale = inputs["logit_scale"]
    right = [F.cross_entropy(head.classify(images, t), labels) for t in text[:2]]
    loss = right[0] + right[1] + align(text[0], text[1], text[2], case["alpha"])
    assert right[0].item() == pytest.approx(case["ce_global"], rel=1e-6)
    assert right[1].item() == pytest.approx(case["ce_local"], rel=1e-6)
    assert loss.item() == pytest.approx(case["loss"], rel=1e-6)
    names = ("grad_global", "grad_local", "grad_projected")
    for name, gradient in zip(names, torch.autograd.grad(loss, raw), strict=True):
        torch.testing.assert_close(gradient, numbers(case[name]), rtol=1e-5, atol=1e-6)


def encoder_of(method: Any, n_ctx: int) -> PromptEncoder:
    """g(.) for prompts of this many tokens, made for the purpose."""
    clip = method.clip
    return PromptEncoder(clip.model, clip.tokenizer, method.task.classnames, layout(n_ctx))


@pytest.mark.parametrize("compat", ["paper", "released"])
def test_the_methods_loss_is_the_four_terms_of_a_short_prompt(compat: str) -> None:
    method = make_method("fedpha", compat=compat, **SHORT)
    head = next(
        head
        for client_id in range(20)
        if len((head := make_work(method, method.build(), IMAGES, client_id=client_id).head).used)
        == 2
    )
    own = head.local[:2]
    right, _, vectors = torch.linalg.svd(head.ctx.detach().double(), full_matrices=False)
    assert right.shape == (4, 4)
    onto = (vectors[-head.kept :].mT @ vectors[-head.kept :]).float()
    short = encoder_of(method, 2)
    text = head.encoder(head.ctx), short(own), short(own @ onto)
    unit = F.normalize(IMAGES.features, dim=-1)
    logits = [head.logit_scale * unit @ t.t() for t in text[:2]]
    expected = F.cross_entropy(logits[0], IMAGES.labels) + F.cross_entropy(logits[1], IMAGES.labels)
    expected = expected + (text[1] - text[2]).square().mean()
    expected = expected + (1 - (text[1] - text[0]).norm(dim=-1)).clamp(min=0).mean()
    loss = method.loss(head, *(IMAGES.features, IMAGES.labels), {})
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    (of_local, of_ctx) = torch.autograd.grad(loss, [head.local, head.ctx], retain_graph=True)
    (expected_local, expected_ctx) = torch.autograd.grad(expected, [head.local, head.ctx])
    torch.testing.assert_close(of_local, expected_local, rtol=1e-3, atol=1e-4)
    assert (of_local[2:] == 0).all()
    # The released projection is not detached
    apart = (of_ctx - expected_ctx).norm() / expected_ctx.norm()
    assert (apart < 1e-4) == (compat == "paper")


def test_a_clients_length_is_its_own_and_lasts() -> None:
    method = make_method("fedpha", **SHORT)
    lengths: dict[int, list[int]] = {i: [] for i in range(30)}
    for i, found in lengths.items():
        for server_round in (1, 7):
            work = make_work(method, method.build(), client_id=i, server_round=server_round)
            found.append(len(work.head.used))
            assert work.head.local_encoder.n_ctx == found[0]
    assert {tuple(found) for found in lengths.values()} == {(n, n) for n in (1, 2, 3, 4)}
    # Shorter than the shortest: all are as long as the global prompt
    equal = make_method("fedpha", **{"fedpha.shortest": 9})
    assert {len(make_work(equal, equal.build(), client_id=i).head.used) for i in range(9)} == {4}


def test_prompts_of_several_lengths_train_together_by_length() -> None:
    method = make_method("fedpha", local_epochs=2, lr=0.02, **SHORT)

    def works() -> list[Any]:
        return [make_work(method, method.build(), IMAGES, client_id=i) for i in range(8)]

    alone, joint = works(), works()
    groups: dict[Any, list[Any]] = {}
    for work in joint:
        groups.setdefault(stacked.likeness(method, work), []).append(work)
    assert sorted(len(group[0].head.used) for group in groups.values()) == sorted(
        {len(work.head.used) for work in joint}
    )
    assert max(map(len, groups.values())) > 1
    for group in groups.values():
        if len(group) > 1:
            images = local.first_images(group, 2)
            stacked.check_stackable(stacked.Stack(method, group), *images)
        local.train(method, group)
    for work, other in zip(alone, joint, strict=True):
        local.train(method, [work])
        torch.testing.assert_close(other.head.state(), work.head.state(), rtol=1e-3, atol=1e-5)
        unused = work.head.local[len(work.head.used) :]
        assert torch.equal(unused, method.build().local[len(work.head.used) :])


def test_a_client_predicts_with_its_local_prompt_once_it_has_one() -> None:
    method = make_method("fedpha", **SHORT)
    work = make_work(method, method.build(), IMAGES, method.start().shared)
    head = work.head
    torch.testing.assert_close(head.encode(), head.encoder(head.ctx))
    method.upload(work)
    expected = encoder_of(method, len(head.used))(head.local[: len(head.used)])
    torch.testing.assert_close(head.encode(), expected)
    again = method.build()
    again.load(head.state())
    again = make_work(method, again, IMAGES).head
    torch.testing.assert_close(again.encode(), expected)


def test_the_global_prompt_travels_and_the_local_one_stays(
    federate: Federate, wire: list[Exchange]
) -> None:
    run = federate(method="fedpha", num_server_rounds=1, flat=SHORT)
    assert {name for e in wire for name in (*e.up, *e.down)} == {"ctx"}
    start = make_method("fedpha").build().local
    kept = [load_file(path) for path in sorted(run.path.rglob("round-00001.safetensors"))]
    assert len(kept) == NUM_CLIENTS
    for head in kept:
        assert head.keys() == {"ctx", "local", "trained"}
        assert head["trained"]
        assert (head["local"] - start).abs().max() > 1e-6
