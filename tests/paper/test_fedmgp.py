"""FedMGP: diversity and draw against numbers of its public code; where the common groups go."""

import open_clip
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from pfedmoap_flwr.clip.features import Reading
from pfedmoap_flwr.methods.base import Split, Upload
from pfedmoap_flwr.methods.parts.groups import draw, likeness, nearness
from pfedmoap_flwr.runs import checkpoint
from pfedmoap_flwr.training import local
from support.federation import Exchange, Federate, make_method, make_work
from support.laws import THREE_ROUNDS
from support.oracle import numbers, oracle
from support.tiny import NUM_CLIENTS

VECTOR = oracle("fedmgp_groups")
OWN, COMMON, PLACES = "groups.own.text", "groups.common.text", "groups.places_text"
IMAGES = Split(
    torch.randn(6, 64, generator=torch.Generator().manual_seed(0)),
    torch.tensor([0, 1, 2, 3, 0, 1]),
)


def test_16_the_diversity_term_is_that_of_the_public_code() -> None:
    (said,) = (case for case in VECTOR["diversity"]["cases"] if case["type"] == "cos")
    features = numbers(VECTOR["diversity"]["features"]).requires_grad_()
    released = 1 - likeness(F.normalize(features, dim=-1))
    assert released.item() == pytest.approx(said["added_to_the_loss"], rel=1e-6)
    # Added as it is, it pulls the groups together; the paper's sign keeps them apart
    (gradient,) = torch.autograd.grad(released, features)
    after = [
        1 - likeness(F.normalize(features - step * gradient, dim=-1)) for step in (0.01, -0.01)
    ]
    assert after[0].item() == pytest.approx(said["after_one_descent_step_0_01"], rel=1e-6)
    assert after[1] > released > after[0]


def test_likeness_by_hand() -> None:
    # Pairs of three groups, two classes: cosines 0, 1, 0 and 1, -1, -1
    groups = numbers([[[1, 0], [0, 1]], [[0, 1], [0, 1]], [[1, 0], [0, -1]]])
    assert likeness(groups).item() == pytest.approx(0.0)
    assert likeness(groups[[0, 2]]).item() == pytest.approx(0.0)
    assert likeness(groups[[0, 1]]).item() == pytest.approx(0.5)
    assert likeness(groups[:1]).item() == 0


def test_16_nearness_and_draws_are_those_of_the_public_code() -> None:
    said = VECTOR["selection"]
    near = nearness(numbers(said["local_prompts"]), numbers(said["global_prompts"]))
    torch.testing.assert_close(near, numbers(said["similarity"]), rtol=1e-5, atol=1e-6)
    cases = [case for case in said["cases"] if case["highest"]]
    assert len(cases) == 3
    for case in cases:
        chances = (near / case["temperature"]).softmax(-1)
        expected = numbers(case["first_draw_probabilities"])
        torch.testing.assert_close(chances, expected, rtol=1e-5, atol=1e-6)
        generator = torch.Generator().manual_seed(42 + case["client"] + case["round"])
        drawn = draw(near, len(case["selected"]), case["temperature"], generator)
        assert drawn.tolist() == case["selected"]


def test_a_low_temperature_draws_the_nearest_first() -> None:
    near = numbers([0.1, 0.9, -0.3, 0.5, 0.0])
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        assert draw(near, 3, 0.001, generator).tolist() == [1, 3, 0]
    firsts = {int(draw(near, 1, 100.0, torch.Generator().manual_seed(i))) for i in range(60)}
    assert firsts == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("compat", ["paper", "released"])
def test_the_loss_is_the_mean_over_groups_and_the_term(compat: str) -> None:
    method = make_method("fedmgp", compat=compat, **{"fedmgp.groups": 3, "fedmgp.lambda": 0.7})
    head = method.build()
    text = [head.encoder(group) for group in head.groups.own["text"]]
    unit = F.normalize(IMAGES.features, dim=-1)
    labels = IMAGES.labels.clone()
    labels[4:] = -100
    plain = sum(F.cross_entropy(head.logit_scale * unit[:4] @ t.t(), labels[:4]) for t in text) / 3
    pairs = [(text[i] * text[j]).sum(-1).mean() for i, j in ((0, 1), (0, 2), (1, 2))]
    term = sum(pairs) / 3
    expected = plain + 0.7 * (1 - term if compat == "released" else term)
    torch.testing.assert_close(method.loss(head, IMAGES.features, labels, {}), expected)
    logits = sum(head.logit_scale * unit @ t.t() for t in text) / 3
    torch.testing.assert_close(head(IMAGES.features), logits)


def test_common_groups_take_the_places_of_those_that_were_uploaded() -> None:
    method = make_method("fedmgp")
    head = method.build()
    kept = {OWN: torch.rand(5, 4, 32), PLACES: torch.tensor([3, 0])}
    common = torch.rand(2, 4, 32)
    for tensors in (kept, {COMMON: common}):
        head.load(tensors)
    make_work(method, head, IMAGES)
    own = head.state()[OWN]
    assert torch.equal(own[3], common[0])
    assert torch.equal(own[0], common[1])
    assert torch.equal(own[[1, 2, 4]], kept[OWN][[1, 2, 4]])


def test_a_client_uploads_the_groups_drawn_and_keeps_its_own_as_they_are() -> None:
    method = make_method("fedmgp", local_epochs=1, **{"fedmgp.temperature": 0.001})
    head = method.build()
    received = method.start().shared
    work = make_work(method, head, IMAGES, received, server_round=2)
    local.train(method, [work])
    trained = head.state()[OWN]
    # Trained from the common ones, the first two are still the nearest to them
    assert set(nearness(trained, received[COMMON]).argsort(descending=True)[:2].tolist()) == {0, 1}
    uploaded = method.upload(work)[COMMON]
    places = head.state()[PLACES]
    assert set(places.tolist()) == {0, 1}
    assert torch.equal(uploaded, trained[places])
    # Measured later with what it kept, nothing is overwritten
    again = method.build()
    again.load(head.state())
    make_work(method, again, IMAGES, received)
    assert torch.equal(again.state()[OWN], trained)


def test_in_round_1_all_groups_are_drawn_alike() -> None:
    method = make_method("fedmgp", **{"fedmgp.temperature": 0.001})
    places = set()
    for client_id in range(40):
        work = make_work(method, method.build(), IMAGES, method.start().shared, client_id)
        method.upload(work)
        drawn = work.head.state()[PLACES].tolist()
        assert len(set(drawn)) == 2
        places |= {tuple(drawn)}
    assert len(places) > 10


def test_the_server_averages_rank_by_rank() -> None:
    uploads = {
        i: Upload({COMMON: torch.full((2, 4, 32), v) * torch.tensor([1.0, 10.0]).view(2, 1, 1)}, n)
        for i, (v, n) in enumerate([(1.0, 1), (5.0, 3)])
    }
    for compat, mean in (("paper", 4.0), ("released", 3.0)):
        method = make_method("fedmgp", compat=compat)
        state = method.start()
        method.merge(state, uploads)
        assert (state.shared[COMMON][0] == mean).all()
        assert (state.shared[COMMON][1] == 10 * mean).all()


def test_a_visual_group_is_a_prompt_inside_the_tower_and_pairs_with_its_text() -> None:
    method = make_method("fedmgp", **{"fedmgp.groups": 2, "fedmgp.visual": 3, "fedmgp.lambda": 0.7})
    assert method.reads(method.own) == Reading("pixels")
    head, pixels = method.build(), torch.rand(4, 3, 16, 16)
    own = head.groups.own
    assert own["visual"].shape == (2, 3, 64)
    visual = open_clip.create_model("tiny", str(method.clip.checkpoint)).visual.eval()
    images = []
    for prompts in own["visual"]:
        # open_clip's own blocks, with the prompts between the class token and the patches
        tokens = visual._embeds(pixels)
        tokens = torch.cat([tokens[:, :1], prompts.expand(4, -1, -1), tokens[:, 1:]], dim=1)
        pooled, _ = visual._pool(visual.transformer(tokens))
        images.append(F.normalize(pooled @ visual.proj, dim=-1))
    text = [head.encoder(prompts) for prompts in own["text"]]
    logits = [head.logit_scale * x @ t.t() for x, t in zip(images, text, strict=True)]
    torch.testing.assert_close(head(pixels), sum(logits) / 2)
    labels = torch.tensor([0, 1, 3, -100])
    plain = sum(F.cross_entropy(each, labels) for each in logits) / 2
    # The mean of both kinds of likeness; the padded image counts in neither
    term = ((text[0] * text[1]).sum(-1).mean() + (images[0] * images[1]).sum(-1)[:3].mean()) / 2
    torch.testing.assert_close(method.loss(head, pixels, labels, {}), plain + 0.7 * term)


def test_visual_groups_are_trained_drawn_and_sent_by_themselves(
    federate: Federate, wire: list[Exchange]
) -> None:
    run = federate(method="fedmgp", num_server_rounds=2, local_epochs=1, flat={"fedmgp.visual": 2})
    names = {COMMON: (2, 4, 32), "groups.common.visual": (2, 2, 64)}
    for exchange in wire:
        for tensors in (exchange.down, exchange.up) if exchange.up else (exchange.down,):
            assert {name: tuple(t.shape) for name, t in tensors.items()} == names
    kept = {p.parent.name: load_file(p) for p in run.path.rglob("round-00002.safetensors")}
    start = make_method("fedmgp", **{"fedmgp.visual": 2}).build().state()
    differ = False
    for head in kept.values():
        for kind in ("text", "visual"):
            moved = (head[f"groups.own.{kind}"] - start[f"groups.own.{kind}"]).flatten(1)
            assert (moved.abs().amax(1) > 0).all()
        differ |= not torch.equal(head[PLACES], head["groups.places_visual"])
    assert differ


def test_groups_start_from_words_but_for_a_little_noise() -> None:
    method = make_method("fedmgp", **{"prompt.ctx-init": "a photo"})
    groups = method.build().state()[OWN]
    words = method.clip.embed("a photo")
    assert groups.shape == (5, 2, 32)
    assert torch.equal(groups[0], words)
    assert (groups[1:] - words).std().item() == pytest.approx(0.01, rel=0.2)
    assert len({group.numpy().tobytes() for group in groups}) == 5
    random = make_method("fedmgp").build().state()[OWN]
    assert random.std().item() == pytest.approx(0.02, rel=0.1)


def test_copies_of_some_groups_travel_and_all_stay(
    federate: Federate, wire: list[Exchange]
) -> None:
    run = federate(method="fedmgp", num_server_rounds=2, local_epochs=1)
    assert {name for e in wire for name in (*e.up, *e.down)} == {COMMON}
    assert {tensor.shape for e in wire for tensor in e.down.values()} == {(2, 4, 32)}
    kept = {p.parent.name: load_file(p) for p in run.path.rglob("round-00002.safetensors")}
    assert len(kept) == NUM_CLIENTS
    sent = {f"client-{e.client}": e for e in wire if e.kind == "train" and e.round == 2}
    start = make_method("fedmgp").build().state()[OWN]
    for name, head in kept.items():
        assert torch.equal(head[OWN][head[PLACES]], sent[name].up[COMMON])
        assert ((head[OWN] - start).flatten(1).abs().amax(1) > 1e-6).all()


@pytest.mark.slow
def test_9_with_one_group_it_is_promptfl(reference: Federate, federate: Federate) -> None:
    ours = federate("ours", method="fedmgp", flat={"fedmgp.groups": 1}, **THREE_ROUNDS)
    theirs = reference(method="promptfl", **THREE_ROUNDS)
    one, other = checkpoint.load(ours.path), checkpoint.load(theirs.path)
    assert torch.equal(one.shared[COMMON][0], other.shared["ctx"])
    assert [r.clients for r in ours.rounds()] == [r.clients for r in theirs.rounds()]
    assert [r.train_loss for r in ours.rounds()] == [r.train_loss for r in theirs.rounds()]
