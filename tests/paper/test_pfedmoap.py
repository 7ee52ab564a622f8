"""pFedMoAP end to end: who gets which experts, what stays where, what is evaluated."""

from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from pfedmoap_flwr import config
from pfedmoap_flwr.clip.features import Reading
from pfedmoap_flwr.federation.strategy import PromptStrategy
from pfedmoap_flwr.methods.base import Upload
from pfedmoap_flwr.methods.pfedmoap import PFedMoAPHead
from pfedmoap_flwr.runs import checkpoint
from pfedmoap_flwr.training import local
from pfedmoap_flwr.training.node import node_of
from support.federation import Exchange, Federate, kept_head, make_method, make_work
from support.laws import SHORT
from support.tiny import NUM_CLIENTS, TINY


def trained(wire: list[Exchange]) -> list[Exchange]:
    return [exchange for exchange in wire if exchange.kind == "train"]


def fresh_head() -> PFedMoAPHead:
    return make_method("pfedmoap").build()


class Watch:
    """Every client's head before and after each of its trainings, by (client, round)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.before: dict[tuple[int, int], dict[str, Tensor]] = {}
        self.after: dict[tuple[int, int], dict[str, Tensor]] = {}
        train = local.train

        def watched(method: Any, works: Any, phases: Any = None) -> dict[int, float | None]:
            (work,) = works
            when = work.client_id, work.round
            self.before[when] = work.head.state()
            losses = train(method, works, phases)
            self.after[when] = work.head.state()
            return losses

        monkeypatch.setattr(local, "train", watched)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


def gate_of(head: dict[str, Tensor]) -> Tensor:
    return torch.cat([t.flatten() for name, t in sorted(head.items()) if name.startswith("gate.")])


# The first participation


@pytest.mark.parametrize("compat", ["paper", "released"])
def test_the_first_participation_is_promptfl(
    compat: str, federate: Federate, wire: list[Exchange]
) -> None:
    run = federate("ours", num_server_rounds=1, compat=compat)
    assert all(exchange.down.keys() == {"ctx"} for exchange in wire)
    rival = federate("rival", method="promptfl", num_server_rounds=1, compat=compat)
    ours, theirs = checkpoint.load(run.path), checkpoint.load(rival.path)
    assert torch.equal(ours.shared["ctx"], theirs.shared["ctx"])
    fresh = gate_of(fresh_head().state())
    for client in range(NUM_CLIENTS):
        kept = kept_head(run, client, 1)
        assert torch.equal(kept["ctx"], kept_head(rival, client, 1)["ctx"])
        assert torch.equal(kept["ctx"], ours.pool[client]["ctx"])
        assert "experts" not in kept
        assert torch.equal(gate_of(kept), fresh)
    assert [r.clients for r in run.rounds()] == [r.clients for r in rival.rounds()]


def test_a_late_first_participation_is_plain_too(
    federate: Federate, wire: list[Exchange], watch: Watch
) -> None:
    federate(num_server_rounds=5, fraction_train=0.5)
    seen: set[int] = set()
    late = 0
    fresh = gate_of(fresh_head().state())
    for exchange in trained(wire):
        when = (exchange.client, exchange.round)
        first = exchange.client not in seen
        assert ("experts" in exchange.down) != first
        assert ("experts" in watch.before[when]) != first
        assert torch.equal(gate_of(watch.after[when]), fresh) == first
        late += first and exchange.round > 1
        seen.add(exchange.client)
    assert late > 0


# Experts


def nearest(pool: dict[int, Tensor], reference: Tensor, client: int, sign: int) -> list[int]:
    """Brute force, in float64: others in order of their distance to a prompt."""
    distance = {
        other: sign * np.linalg.norm(prompt.double().numpy() - reference.double().numpy())
        for other, prompt in pool.items()
        if other != client
    }
    return sorted(distance, key=lambda other: (distance[other], other))


@pytest.mark.slow
@pytest.mark.parametrize(("selection", "sign"), [("knn", 1), ("farthest", -1)])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_experts_are_the_nearest_in_the_pool_of_the_round_before(
    selection: str, sign: int, fraction: float, federate: Federate, wire: list[Exchange]
) -> None:
    federate(
        num_server_rounds=7,
        fraction_train=fraction,
        lr=0.01,
        **SHORT,
        flat={"data.num-clients": 6, "pfedmoap.selection": selection},
    )
    pool: dict[int, Tensor] = {}
    age: dict[int, int] = {}
    told_apart, stale, compared = 0, 0, 0
    for server_round in range(1, 8):
        exchanges = [e for e in trained(wire) if e.round == server_round]
        assert len(exchanges) == 6 * fraction
        for exchange in exchanges:
            client = exchange.client
            assert ("experts" in exchange.down) == (client in pool)
            if client not in pool:
                continue
            chosen = nearest(pool, pool[client], client, sign)[:2]
            sent = exchange.down["experts"]
            assert torch.equal(sent, torch.stack([pool[c] for c in chosen]))
            compared += 1
            stale += len({age[c] for c in chosen}) > 1
            told_apart += chosen != nearest(pool, exchange.down["ctx"], client, sign)[:2]
        # Eq. 7, at the end of the round
        pool |= {e.client: e.up["ctx"] for e in exchanges}
        age |= {e.client: server_round for e in exchanges}
    assert compared >= 12
    # The client's own old prompt is the reference, which is not what P_g would give
    assert told_apart > 0
    assert (stale > 0) == (fraction < 1)


def test_random_experts_are_others_and_change(federate: Federate, wire: list[Exchange]) -> None:
    options: dict[str, Any] = {"data.num-clients": 6, "pfedmoap.selection": "random"}
    federate("once", num_server_rounds=4, flat=options, local_epochs=1)
    pool: dict[int, Tensor] = {}
    chosen: dict[tuple[int, int], list[int]] = {}
    for server_round in range(1, 5):
        exchanges = [e for e in trained(wire) if e.round == server_round]
        for e in exchanges:
            chosen[e.client, e.round] = [
                next(c for c, prompt in pool.items() if torch.equal(prompt, expert))
                for expert in e.down.get("experts", [])
            ]
        pool = {e.client: e.up["ctx"] for e in exchanges}
    for (client, server_round), experts in chosen.items():
        assert len(set(experts)) == (2 if server_round > 1 else 0)
        assert client not in experts
    sets = {client: {tuple(chosen[client, r]) for r in (2, 3, 4)} for client in range(6)}
    assert any(len(drawn) > 1 for drawn in sets.values())
    # Clients do not draw the same places in their lists of others
    others = {client: sorted(set(range(6)) - {client}) for client in range(6)}
    places = {tuple(others[c].index(e) for e in chosen[c, 2]) for c in range(6)}
    assert len(places) > 2


@pytest.mark.slow
@pytest.mark.parametrize("num_experts", [0, 1, 3, 50])
@pytest.mark.parametrize("compat", ["paper", "released"])
def test_k_from_none_to_more_than_there_are(
    num_experts: int, compat: str, federate: Federate, wire: list[Exchange]
) -> None:
    flat = {"pfedmoap.num-experts": num_experts}
    run = federate(num_server_rounds=3, compat=compat, flat=flat, **SHORT)
    k = min(num_experts, NUM_CLIENTS - 1)
    for exchange in trained(wire):
        if exchange.round > 1:
            assert exchange.down["experts"].shape == (k, 4, 32)
    assert not any(record.failed for record in run.rounds())
    kept = kept_head(run, 0, 3)
    assert kept["experts"].shape == (k, 4, 32)
    assert not torch.equal(gate_of(kept), gate_of(fresh_head().state()))


def test_a_client_alone_in_the_pool_has_its_gate_to_itself(
    federate: Federate, wire: list[Exchange], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PromptStrategy, "participants", lambda self, number, attempt: [1])
    run = federate(num_server_rounds=2)
    assert trained(wire)[1].down["experts"].shape == (0, 4, 32)
    assert not any(record.failed for record in run.rounds())


# What stays, and what does not leak


def test_the_gate_never_leaves_its_client(federate: Federate, wire: list[Exchange]) -> None:
    run = federate(num_server_rounds=3)
    assert {name for e in wire for name in (*e.up, *e.down)} == {"ctx", "experts"}
    assert {name for e in wire for name in e.up} == {"ctx"}
    with safe_open(run.path / "checkpoint.safetensors", framework="pt") as file:
        names = set(file.keys())
    of_pool = {f"pool/{i}/{name}" for i in range(NUM_CLIENTS) for name in ("ctx", "round")}
    assert names == {"shared/ctx", *of_pool}


def test_every_client_goes_on_with_its_own_gate(federate: Federate, watch: Watch) -> None:
    federate(num_server_rounds=4, fraction_train=0.75)
    fresh = gate_of(fresh_head().state())
    last: dict[int, Tensor] = {}
    for (client, server_round), before in watch.before.items():
        # Others have trained in this process in between
        assert torch.equal(gate_of(before), last.get(client, fresh)), (client, server_round)
        last[client] = gate_of(watch.after[client, server_round])
    moved = {client: gate for client, gate in last.items() if not torch.equal(gate, fresh)}
    assert len(moved) == NUM_CLIENTS
    for a in moved:
        for b in range(a):
            assert (moved[a] - moved[b]).abs().max() > 1e-5


def test_training_restarts_from_the_global_prompt(
    federate: Federate, watch: Watch, wire: list[Exchange]
) -> None:
    run = federate(num_server_rounds=3)
    means = {0: trained(wire)[0].down["ctx"]}
    for server_round in (1, 2, 3):
        sent = [e for e in trained(wire) if e.round == server_round]
        n = {e.client: e.reply.content["metrics"]["num-examples"] for e in sent}
        assert len(set(n.values())) == NUM_CLIENTS
        mean = sum(e.up["ctx"].double() * n[e.client] for e in sent) / sum(n.values())
        plain = sum(e.up["ctx"].double() for e in sent) / len(sent)
        means[server_round] = mean.float()
        assert (mean - plain).abs().max() > 1e-6
        for e in sent:
            torch.testing.assert_close(e.down["ctx"], means[server_round - 1], rtol=1e-6, atol=1e-8)
            assert torch.equal(watch.before[e.client, server_round]["ctx"], e.down["ctx"])
            assert torch.equal(watch.after[e.client, server_round]["ctx"], e.up["ctx"])
    shared = checkpoint.load(run.path).shared["ctx"]
    torch.testing.assert_close(shared, means[3], rtol=1e-6, atol=1e-8)


def test_merge_is_the_mean_by_number_of_images_in_float64() -> None:
    method = make_method("pfedmoap")
    server = method.start()
    generator = torch.Generator().manual_seed(0)
    sizes = {5: 1, 2: 1000, 9: 33}
    prompts = {c: torch.randn(4, 32, generator=generator) for c in sizes}
    method.merge(server, {c: Upload({"ctx": prompts[c]}, n) for c, n in sizes.items()})
    rows = np.stack([prompts[c].double().numpy() for c in sizes])
    expected = np.average(rows, axis=0, weights=list(sizes.values()))
    np.testing.assert_allclose(server.shared["ctx"].numpy(), expected, rtol=2e-7)
    assert all(torch.equal(server.pool[c]["ctx"], prompts[c]) for c in sizes)
    before = server.shared["ctx"].clone()
    method.merge(server, {})
    assert torch.equal(server.shared["ctx"], before)


@pytest.mark.parametrize("batch_size", [7, 96])
def test_the_loss_is_the_mean_over_all_images(batch_size: int, federate: Federate) -> None:
    # Steps so small that the prompt stays where it starts
    run = federate(num_server_rounds=1, batch_size=batch_size, lr=1e-12)
    settings = config.parse(TINY)
    node = node_of(settings.clip, settings.data, 0, "cpu", Reading())
    parts = [node.split(client, "train") for client in range(NUM_CLIENTS)]
    features, labels = (torch.cat([getattr(p, n) for p in parts]) for n in ("features", "labels"))
    assert len({len(part) % 7 for part in parts}) > 1
    expected = torch.nn.functional.cross_entropy(fresh_head()(features), labels).item()
    assert run.rounds()[1].train_loss == pytest.approx(expected, abs=1e-5)


# Evaluation


def test_who_was_never_selected_is_evaluated_with_the_global_prompt(federate: Federate) -> None:
    run = federate(num_server_rounds=3, fraction_train=0.5, lr=0.05, seed=1)
    seen: set[int] = set()
    waiting = differing = 0
    for record in run.rounds():
        seen |= set(record.bytes_up)
        for client, metrics in record.clients.items():
            for split in ("", "validation-"):
                personal = metrics[f"personal-{split}accuracy"]
                same = personal == metrics[f"global-{split}accuracy"]
                assert same or client in seen
                waiting += client not in seen and record.round > 0
                differing += not same
        assert record.clients.keys() == set(range(NUM_CLIENTS))
    assert waiting > 0
    assert differing > 0


def test_the_personal_model_is_what_the_last_training_left(
    federate: Federate, watch: Watch
) -> None:
    run = federate(num_server_rounds=4, fraction_train=0.5, lr=0.02)
    settings = config.parse({**TINY, "lr": 0.02})
    node = node_of(settings.clip, settings.data, 0, "cpu", Reading())
    last: dict[int, dict[str, Tensor]] = {}
    for record in run.rounds()[1:]:
        last |= {c: watch.after[c, record.round] for c in record.bytes_up}
        for client, kept in last.items():
            head = fresh_head()
            head.load(kept)
            make_work(make_method("pfedmoap"), head)
            assert (head.experts is None) == ("experts" not in kept)
            (expected,) = local.accuracies(head, {"test": node.split(client, "test")}).values()
            assert record.clients[client]["personal-accuracy"] == expected
    assert any("experts" in kept for kept in last.values())
