"""SGPT: choice of groups and the server's step against numbers of its public code; two stages."""

from typing import Any

import open_clip
import pytest
import torch
from torch.nn import functional as F

from pfedmoap_flwr.clip.features import Reading
from pfedmoap_flwr.clip.template import parse
from pfedmoap_flwr.methods.base import ServerState, Split, Upload
from pfedmoap_flwr.methods.parts.keys import Keys
from pfedmoap_flwr.runs import checkpoint
from pfedmoap_flwr.training import local, stacked
from support.federation import Exchange, Federate, make_method, make_work
from support.laws import THREE_ROUNDS
from support.oracle import numbers, oracle
from support.works import made_works

VECTOR = oracle("sgpt_groups")
KEYS, SHARE = "choice.keys", "choice.share"
IMAGES = Split(
    torch.randn(6, 64, generator=torch.Generator().manual_seed(0)),
    torch.tensor([0, 1, 2, 3, 0, -100]),
)
CASES = VECTOR["selection"]["cases"]


def oracle_keys(*, together: bool = False) -> Keys:
    keys = numbers(VECTOR["selection"]["inputs"]["keys"])
    count, width = keys.shape
    made = Keys(count, width, torch.Generator(), together=together)
    made.keys = torch.nn.Parameter(keys)
    return made


@pytest.mark.parametrize("case", [case for case in CASES if case["training"]])
def test_16_choice_and_loss_of_keys_are_those_of_the_public_code(case: dict[str, Any]) -> None:
    queries = numbers(VECTOR["selection"]["inputs"]["query"])
    keys = oracle_keys(together=case["dataset"] == "office")
    counts = numbers(case["global_counts"])
    if counts.any():
        keys.share = counts / counts.sum()
    groups, pull = keys.choose(queries, torch.ones(len(queries), dtype=torch.bool))
    assert groups.tolist() == case["group"]
    assert pull.item() == pytest.approx(case["key_loss"], rel=1e-6)
    # Before anything is counted its scores are the distances alone
    scores = keys.apart(queries) * (keys.share + 5e-4 if counts.any() else 1)
    expected = numbers(case["scores"])
    torch.testing.assert_close(scores.amin(-1), expected, rtol=1e-6, atol=1e-8)


def test_16_in_a_test_the_nearest_key_decides() -> None:
    (case,) = (case for case in CASES if not case["training"])
    queries, keys = numbers(VECTOR["selection"]["inputs"]["query"]), oracle_keys()
    keys.share = torch.tensor([0.6, 0.1, 0.3])
    assert keys.nearest(queries).tolist() == case["group"]
    least = keys.apart(queries).amin(-1)
    torch.testing.assert_close(least, numbers(case["scores"]), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("together", [False, True])
def test_padding_has_no_say(together: bool) -> None:
    queries, keys = numbers(VECTOR["selection"]["inputs"]["query"]), oracle_keys(together=together)
    few = torch.tensor([False, True, False, False, True])  # both prefer group 1
    groups, pull = keys.choose(queries, few)
    alone, alone_pull = keys.choose(queries[few], torch.ones(2, dtype=torch.bool))
    assert groups[few].tolist() == alone.tolist() == [1, 1]
    torch.testing.assert_close(pull, alone_pull)
    if together:
        assert groups.tolist() == [1] * 5


def test_16_the_servers_step_is_that_of_the_public_code() -> None:
    said = VECTOR["aggregation"]
    method = make_method("sgpt", **{"sgpt.groups": 3})
    (result,) = (case["result"] for case in said["cases"] if not case["all_moment"])

    def named(sent: dict[str, Any]) -> dict[str, torch.Tensor]:
        # Its third group has no prompt in the file; the mean of prompts does not ask for one
        prompts = [numbers(sent[f"prompt_embeddings.{i}"]) for i in range(2)]
        ctx = numbers(sent["prompt_common.0"])
        return {"ctx": ctx, "groups": torch.stack(prompts), KEYS: numbers(sent["prompt_keys"])}

    state = ServerState(named(said["global_before"]), extra={"counts": numbers([1, 2, 3])})
    uploads = {
        client: Upload(
            named(said["clients_sent"][str(client)])
            | {"counts": numbers(said["counts"][str(client)])},
            int(4 * weight),
        )
        for client, weight in zip(said["clients"], said["sample_weights"], strict=True)
    }
    method.merge(state, uploads)
    expected = named(result)
    torch.testing.assert_close(state.shared, expected, rtol=1e-6, atol=1e-6)
    assert state.extra["counts"].tolist() == [61, 22, 63]


def test_a_groups_share_of_all_images_so_far_is_sent() -> None:
    method = make_method("sgpt", **{"sgpt.groups": 3})
    state = method.start()
    first = method.send(state, [0, 1], train=True)
    assert [sent[SHARE].tolist() for sent in first.values()] == [[1, 1, 1]] * 2
    for counts in ([3.0, 0.0, 1.0], [0.0, 0.0, 4.0]):
        shared = {name: tensor.clone() for name, tensor in state.shared.items()}
        method.merge(state, {0: Upload(shared | {"counts": torch.tensor(counts)}, 1)})
    assert method.send(state, [0], train=False)[0][SHARE].tolist() == [0.375, 0, 0.625]


def near_key(raw: torch.Tensor) -> torch.Tensor:
    return F.normalize(raw.relu(), dim=-1)


def chosen_by_hand(method: Any, head: Any, features: torch.Tensor) -> list[int]:
    queries = F.normalize(features.clamp_min(0), dim=-1)
    scores = (1 - queries @ F.normalize(head.choice.keys, dim=-1).t()) * (head.choice.share + 5e-4)
    return [int(row.argmin()) for row in scores]


def test_the_loss_is_the_sum_of_both_stages_losses() -> None:
    method = make_method("sgpt", **{"sgpt.groups": 3, "sgpt.tokens": 2})
    head = method.build()
    head.load({SHARE: torch.tensor([0.5, 0.3, 0.2])})
    head.choice.keys.data[0] = near_key(IMAGES.features[3])
    x, labels = F.normalize(IMAGES.features[:5], dim=-1), IMAGES.labels[:5]
    longer = method.encoder(parse("{soft:6} {class}.", len))
    groups = chosen_by_hand(method, head, IMAGES.features[:5])
    assert len(set(groups)) > 1
    alone = F.cross_entropy(head.logit_scale * x @ head.encoder(head.ctx).t(), labels)
    text = [longer(torch.cat([head.ctx, head.groups[group]])) for group in groups]
    joint = [head.logit_scale * text_of @ x_of for text_of, x_of in zip(text, x, strict=True)]
    queries = F.normalize(IMAGES.features[:5].relu(), dim=-1)
    pull = -(queries * F.normalize(head.choice.keys, dim=-1)[groups]).sum(-1).mean()
    joint_loss = F.cross_entropy(torch.stack(joint), labels)
    # The sixth image is padding
    loss = method.loss(head, IMAGES.features, IMAGES.labels, {})
    torch.testing.assert_close(loss, alone + joint_loss + pull)
    own = [head.ctx, head.groups, head.choice.keys]
    found = torch.autograd.grad(loss, own)
    (of_ctx,) = torch.autograd.grad(alone, own[:1])
    of_groups, of_keys = torch.autograd.grad(joint_loss + pull, own[1:])
    torch.testing.assert_close(found, (of_ctx, of_groups, of_keys))


def test_a_test_image_is_classified_with_its_nearest_group() -> None:
    method = make_method("sgpt", **{"sgpt.groups": 3})
    head = method.build()
    head.load({SHARE: torch.tensor([1.0, 0.0, 0.0])})
    longer = method.encoder(parse("{soft:6} {class}.", len))
    queries = F.normalize(IMAGES.features.relu(), dim=-1)
    groups = (queries @ F.normalize(head.choice.keys, dim=-1).t()).argmax(-1).tolist()
    assert len(set(groups)) > 1
    unit = F.normalize(IMAGES.features, dim=-1)
    logits = [
        head.logit_scale * longer(torch.cat([head.ctx, head.groups[group]])) @ x
        for group, x in zip(groups, unit, strict=True)
    ]
    torch.testing.assert_close(head(IMAGES.features), torch.stack(logits))


def test_stages_move_one_after_the_other_and_counts_go_up() -> None:
    method = make_method("sgpt", local_epochs=3, batch_size=4)
    head, received = method.build(), method.send(method.start(), [0], train=True)[0]
    start = head.state()
    assert method.schedule(head, 3) == [(3, ("ctx",)), (3, ("groups", KEYS))]
    images = Split(IMAGES.features[:5], IMAGES.labels[:5])
    work = make_work(method, head, images, received)
    local.train(method, [work])
    trained = head.state()
    used = set(chosen_by_hand(method, method.build(), images.features))
    for name in ("ctx", KEYS):
        assert not torch.equal(trained[name], start[name])
    moved = (trained["groups"] - start["groups"]).flatten(1).any(1)
    assert {g for g in range(4) if moved[g]} >= used
    uploaded = method.upload(work)
    assert uploaded.keys() == {"ctx", "groups", KEYS, "counts"}
    # Every image once for each of three epochs, by the keys as trained
    expected = torch.bincount(
        torch.tensor(chosen_by_hand(method, head, images.features)), minlength=4
    )
    assert uploaded["counts"].tolist() == (3 * expected).tolist()
    padded = make_work(method, head, IMAGES, received)
    assert torch.equal(method.upload(padded)["counts"], uploaded["counts"])


def test_in_a_batch_together_all_images_count_for_one_group() -> None:
    method = make_method("sgpt", local_epochs=1, batch_size=3, **{"sgpt.together": True})
    head = method.build()
    work = make_work(method, head, Split(IMAGES.features, torch.arange(6) % 4), {})
    groups = chosen_by_hand(method, head, IMAGES.features)
    votes = [torch.bincount(torch.tensor(groups[i : i + 3]), minlength=4) for i in (0, 3)]
    expected = torch.zeros(4)
    for vote in votes:
        expected[vote.argmax()] += 3
    assert torch.equal(method.upload(work)["counts"], expected)


# Inside the image tower


def test_the_visual_form_has_prompts_inside_the_tower() -> None:
    method = make_method("sgpt", **{"sgpt.groups": 3, "sgpt.visual": 3, "sgpt.tokens": 2})
    assert method.reads(method.own) == Reading("pixels")
    head = method.build()
    pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    assert head.ctx.shape == (3, 64)
    assert head.groups.shape == (3, 2, 64)
    visual = open_clip.create_model("tiny", str(method.clip.checkpoint)).visual.eval()

    def encoded(image: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        # open_clip's own blocks, with the prompts between the class token and the patches
        tokens = visual._embeds(image[None])
        tokens = torch.cat([tokens[:, :1], prompts[None], tokens[:, 1:]], dim=1)
        pooled, _ = visual._pool(visual.transformer(tokens))
        return F.normalize(pooled @ visual.proj, dim=-1)

    with torch.no_grad():
        raw = visual(pixels)
    head.choice.keys.data[:2] = near_key(raw[[0, 2]])
    groups = chosen_by_hand(method, head, raw)
    assert len(set(groups)) > 1
    text = method.clip.zeroshot(method.task.classnames, method.task.template)
    joint = [
        head.logit_scale * encoded(image, torch.cat([head.ctx, head.groups[group]])) @ text.t()
        for image, group in zip(pixels, groups, strict=True)
    ]
    torch.testing.assert_close(head(pixels), torch.cat(joint))
    labels = torch.tensor([0, 1, 3, -100])
    alone = [head.logit_scale * encoded(image, head.ctx) @ text.t() for image in pixels]
    queries = F.normalize(raw.relu(), dim=-1)[:3]
    pull = -(queries * F.normalize(head.choice.keys, dim=-1)[groups[:3]]).sum(-1).mean()
    plain = F.cross_entropy(torch.cat(alone), labels)
    joint_loss = F.cross_entropy(torch.cat(joint), labels)
    loss = method.loss(head, pixels, labels, {})
    torch.testing.assert_close(loss, plain + joint_loss + pull)
    (of_ctx,) = torch.autograd.grad(plain, head.ctx)
    found = torch.autograd.grad(loss, [head.ctx, head.groups])
    torch.testing.assert_close(found[0], of_ctx)
    torch.testing.assert_close(found[1], torch.autograd.grad(joint_loss, head.groups)[0])


@pytest.mark.parametrize("visual", [0, 2])
@pytest.mark.parametrize("together", [False, True])
def test_stacked_losses_of_both_forms_are_each_ones_own(visual: int, together: bool) -> None:
    settings = {"sgpt.visual": visual, "sgpt.together": together}
    method = make_method("sgpt", **settings)
    works = made_works(method, (12, 9, 3))
    stacked.check_stackable(stacked.Stack(method, works), *local.first_images(works, 2))


def test_a_run_of_the_visual_form_sends_what_it_says(
    federate: Federate, wire: list[Exchange]
) -> None:
    flat = {"sgpt.visual": 2, "sgpt.tokens": 1}
    run = federate(method="sgpt", num_server_rounds=2, local_epochs=1, flat=flat)
    names = {"ctx": (2, 64), "groups": (4, 1, 64), KEYS: (4, 64)}
    for exchange in wire:
        assert {n: tuple(t.shape) for n, t in exchange.down.items()} == names | {SHARE: (4,)}
        if exchange.kind == "train":
            assert {n: tuple(t.shape) for n, t in exchange.up.items()} == names | {"counts": (4,)}
    state = checkpoint.load(run.path)
    images = sum(row["train"] for row in run.clients())
    assert state.extra["counts"].sum() == 2 * images
    start = make_method("sgpt", **flat).start().shared
    assert all(not torch.equal(state.shared[name], start[name]) for name in names)


@pytest.mark.slow
def test_9_the_shared_prompt_is_that_of_promptfl(reference: Federate, federate: Federate) -> None:
    ours = federate("ours", method="sgpt", **THREE_ROUNDS)
    theirs = reference(method="promptfl", **THREE_ROUNDS)
    one, other = checkpoint.load(ours.path), checkpoint.load(theirs.path)
    assert torch.equal(one.shared["ctx"], other.shared["ctx"])
    start = make_method("sgpt").start().shared
    assert not torch.equal(one.shared["groups"], start["groups"])
