"""DisPFL's masks, means and steps, against its public code's numbers and by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pfedmoap_flwr.methods.base import Split, Upload
from pfedmoap_flwr.methods.parts import masks
from pfedmoap_flwr.training import local
from support.federation import Exchange, Federate, kept_head, make_method, make_work
from support.laws import THREE_ROUNDS
from support.oracle import numbers, oracle
from support.tiny import NUM_CLIENTS

VECTOR = oracle("dispfl_masks")
# All entries, and no pull to 0
OVERFITTING = {"dispfl.density": 1.0, "dispfl.decay": 0.0, "dispfl.lr-factor": 1.0}


def bools(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.bool)


@pytest.mark.parametrize("case", VECTOR["rounds"], ids=lambda case: f"round {case['round']}")
def test_16_masks_are_pruned_and_regrown_as_in_the_public_code(case: Any) -> None:
    inputs = VECTOR["inputs"]
    mask, weights = bools(inputs["mask"]), numbers(inputs["weights"])
    rate = masks.drop_rate(inputs["anneal_factor"], case["round"], inputs["comm_round"])
    assert rate == pytest.approx(case["drop_ratio"], abs=1e-6)
    left = masks.pruned(mask, weights, case["removed"])
    assert torch.equal(left, bools(case["after_prune"]))
    gradient = numbers(inputs["gradient"])
    assert torch.equal(masks.regrown(left, gradient, case["removed"]), bools(case["after_regrow"]))
    learned = nn.Parameter(weights)
    found = masks.exchanged(mask, learned, (learned * gradient).sum(), rate)
    assert torch.equal(found, bools(case["after_regrow"]))


def test_16_the_mean_is_that_of_the_public_code() -> None:
    said = VECTOR["aggregate"]
    weights = numbers(said["weights"])
    held = bools(said["masks"])
    whole = masks.mean(weights, held)
    before = numbers(said["average_before_own_mask"])
    torch.testing.assert_close(whole, before, rtol=1e-6, atol=1e-6)
    came = {"neighbours": weights[1:], "masks": held}
    expected = numbers(said["result"])
    found = masks.start(weights[0], came, held[0])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_after_the_last_round_of_annealing_masks_stay() -> None:
    assert masks.drop_rate(0.5, 0, 10) == 0.5
    assert masks.drop_rate(0.5, 10, 10) == masks.drop_rate(0.5, 25, 10) == 0


def test_a_drawn_mask_has_its_density() -> None:
    draws = [torch.Generator().manual_seed(seed) for seed in (0, 0, 1)]
    first, same, other = (masks.drawn((4, 32), 0.3, generator) for generator in draws)
    assert first.sum() == other.sum() == 38
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_a_step_by_hand() -> None:
    weights = nn.Parameter(numbers([[1.0, 0.0], [2.0, -4.0]]))
    mask = bools([[1, 0], [1, 1]])
    optimizer = masks.MaskedSGD([{"name": "ctx", "params": [weights]}], mask, 10.0, 0.5, 0.25)
    optimizer.param_groups[0]["lr"] = 0.4
    weights.grad = numbers([[12.0, 99.0], [0.0, 16.0]])
    optimizer.step()
    # Length 20 without the entry that is not held: halved
    expected = [[1 - 0.1 * (6 + 0.5), 0], [2 - 0.1 * 1, -4 - 0.1 * (8 - 2)]]
    torch.testing.assert_close(weights.detach(), numbers(expected))
    weights.grad = numbers([[3.0, 99.0], [0.0, 4.0]])
    before = weights.detach().clone()
    optimizer.step()
    step = numbers([[3.0, 0.0], [0.0, 4.0]]) + 0.5 * before
    torch.testing.assert_close(weights.detach(), before - 0.1 * step)


def test_who_is_whose_neighbour() -> None:
    def of(client_id: int, known: list[int], topology: str, seed: int = 0) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return masks.near(client_id, known, topology, 2, generator)

    ids = [0, 2, 3, 7, 9]
    assert of(3, ids, "full") == [0, 2, 7, 9]
    assert [of(i, ids, "ring") for i in ids] == [[2, 9], [0, 3], [2, 7], [3, 9], [0, 7]]
    # Somebody who never took part has a place in the ring too
    assert of(5, ids, "ring") == [3, 7]
    assert of(1, [0, 1], "ring") == of(1, [0, 1], "full") == of(1, [0, 1], "random") == [0]
    assert of(1, [], "ring") == of(1, [1], "random") == []
    drawn = {tuple(of(3, ids, "random", seed)) for seed in range(30)}
    assert all(len(set(two)) == 2 and set(two) <= {0, 2, 7, 9} for two in drawn)
    assert len(drawn) == 6


def test_a_round_by_hand() -> None:
    settings = {"dispfl.decay": 0.0, "dispfl.anneal-rounds": 4}
    method = make_method("dispfl", local_epochs=1, batch_size=32, lr=0.5, **settings)
    data = Split(torch.randn(12, 64), torch.arange(12) % 4)
    state = method.start()
    generator = torch.Generator().manual_seed(0)
    for i in (0, 1):
        mask = torch.rand(4, 32, generator=generator) < 0.5
        state.pool[i] = {"ctx": torch.randn(4, 32, generator=generator) * mask, "mask": mask}
    state.round = 2
    sent = method.send(state, [0], train=True)[0]
    assert {name: tuple(t.shape) for name, t in sent.items()} == {
        "ctx": (4, 32),
        "neighbours": (1, 4, 32),
        "masks": (2, 4, 32),
    }
    head = method.build()
    own = torch.rand(4, 32, generator=generator) < 0.5
    head.load({"mask": own})
    head.load(sent)
    work = make_work(method, head, data, sent, server_round=3)
    both = state.pool[0]["mask"].int() + state.pool[1]["mask"].int()
    mean = (state.pool[0]["ctx"] + state.pool[1]["ctx"]) / both.clamp_min(1) * own
    torch.testing.assert_close(head.ctx.detach(), mean)
    local.train(method, [work])
    assert not head.ctx[~own].any()
    start = make_method("promptfl").build()
    start.ctx.data.copy_(mean)
    F.cross_entropy(start(data.features), data.labels).backward()
    assert start.ctx.grad is not None
    stepped = mean - 0.5 * 0.998**2 * start.ctx.grad * own
    torch.testing.assert_close(head.ctx.detach(), stepped, rtol=1e-4, atol=1e-5)
    trained = head.ctx.detach().clone()
    sent_up = method.upload(work)
    assert sent_up.keys() == method.expected(state, sent).keys()
    # What goes up is the mask that was in use; the head keeps the next one
    assert torch.equal(sent_up["mask"], own)
    assert torch.equal(sent_up["ctx"], trained)
    # The third of four rounds exchanges 0.25 (1 + cos(pi / 2)) of the mask
    count = -(-int(own.sum()) // 4)
    start.ctx.data.copy_(trained)
    start.ctx.grad = None
    F.cross_entropy(start(data.features), data.labels).backward()
    kept = sorted(trained[own].abs().tolist())[count:]
    stay = own & (trained.abs() >= kept[0])
    worth = sorted(start.ctx.grad[~stay].abs().tolist())[-count:]
    expected = stay | (~stay & (start.ctx.grad.abs() >= worth[0]))
    assert torch.equal(head.mask, expected)
    assert head.mask.sum() == own.sum()


def test_what_is_measured_as_global_is_the_mean_of_those_who_hold_an_entry() -> None:
    method = make_method("dispfl")
    state = method.start()
    one, two = bools([[1, 1, 0, 0]]), bools([[1, 0, 1, 0]])
    uploads = {
        i: Upload({"ctx": v * m.float(), "mask": m}, num_examples=1 + i)
        for i, v, m in ((0, 2.0, one), (1, 6.0, two))
    }
    method.merge(state, uploads)
    assert state.shared["ctx"].tolist() == [[4, 2, 6, 0]]
    assert method.send(state, [0], train=False)[0].keys() == {"ctx"}


def test_clients_pass_their_masked_prompts_on(federate: Federate, wire: list[Exchange]) -> None:
    run = federate(method="dispfl", num_server_rounds=3, flat={"dispfl.num-neighbours": 2})
    trained = {(e.round, e.client): e for e in wire if e.kind == "train"}
    assert len(trained) == 3 * NUM_CLIENTS
    for (number, client), exchange in trained.items():
        mask = exchange.up["mask"]
        assert mask.sum() == 64
        assert not exchange.up["ctx"][~mask].any()
        if number == 1:
            assert exchange.down["masks"].all()
            continue
        before = {i: trained[number - 1, i].up for i in range(NUM_CLIENTS)}
        own, *others = exchange.down["masks"]
        assert torch.equal(own, before[client]["mask"])
        assert torch.equal(exchange.down["ctx"], before[client]["ctx"])
        assert len(others) == 2
        for weights, held in zip(exchange.down["neighbours"], others, strict=True):
            (sender,) = (i for i in before if torch.equal(before[i]["ctx"], weights))
            assert sender != client
            assert torch.equal(before[sender]["mask"], held)
    # Masks are each client's own, and change from round to round
    used = [trained[3, i].up["mask"] for i in range(NUM_CLIENTS)]
    assert not any(torch.equal(used[0], other) for other in used[1:])
    assert not torch.equal(trained[2, 0].up["mask"], used[0])
    assert not torch.equal(kept_head(run, 0)["mask"], used[0])


@pytest.mark.slow
def test_9_dense_and_without_neighbours_it_is_local_training(
    reference: Federate, federate: Federate
) -> None:
    neutral = {**OVERFITTING, "dispfl.num-neighbours": 0, "dispfl.clip": 1e6}
    ours = federate("ours/run", method="dispfl", flat=neutral, **THREE_ROUNDS)
    theirs = reference(method="coop", **THREE_ROUNDS)
    for i in range(NUM_CLIENTS):
        kept = [kept_head(run, i)["ctx"] for run in (ours, theirs)]
        torch.testing.assert_close(kept[0], kept[1], rtol=0, atol=1e-6)
