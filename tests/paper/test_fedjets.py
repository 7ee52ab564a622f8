"""FedJETs: experts on the server, a subset for each client, a gate that says which."""

import torch
from torch.nn import functional as F

from pfedmoap_flwr.methods.base import Split, Upload
from pfedmoap_flwr.training import local
from support.federation import Exchange, make_method, make_work
from support.tiny import NUM_CLIENTS


def test_training_mixes_the_experts_that_came_by_the_gate() -> None:
    method = make_method("fedjets")
    head = method.build()
    head.load({"which": torch.tensor([1, 4])})
    images = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    unit = F.normalize(images, dim=-1).double()
    text = [head.encoder(expert).double() for expert in head.experts]
    scores = head.logit_scale * unit @ head.gate.double().t()
    two = scores[:, [1, 4]].softmax(-1)
    by_expert = torch.stack([head.logit_scale * unit @ text[i].t() for i in (1, 4)], dim=1)
    head.train()
    expected = (two[:, :, None] * by_expert).sum(1)
    torch.testing.assert_close(head(images).double(), expected, rtol=1e-4, atol=1e-4)
    head.eval()
    best = by_expert[torch.arange(3), two.argmax(-1)]
    torch.testing.assert_close(head(images).double(), best, rtol=1e-4, atol=1e-4)
    assert (best - expected).abs().max() > 1e-3


def test_a_client_gets_the_experts_that_it_ranked_highest() -> None:
    method = make_method("fedjets")
    state = method.start()
    assert state.shared.keys() == {"gate", *(f"experts.{i}" for i in range(5))}
    ranks = torch.tensor([0.1, 0.4, 0.05, 0.15, 0.3])
    state.pool[7] = {"ranks": ranks}
    sent = method.send(state, [7, 8], train=True)
    assert sent[7].keys() == {"gate", "which", "experts.1", "experts.4"}
    assert sent[7]["which"].tolist() == [1, 4]
    assert len(sent[8]["which"]) == 2
    anchors = {
        tuple(method.send(state, [i], train=True)[i]["which"].tolist()) for i in range(9, 29)
    }
    assert len(anchors) > 3
    assert method.send(state, [7], train=False)[7]["which"].tolist() == [0, 1, 2, 3, 4]
    expected = method.expected(state, sent[7])
    assert expected.keys() == {"gate", "experts.1", "experts.4", "ranks"}


def test_the_ranks_are_the_gates_mean_over_a_clients_images() -> None:
    method = make_method("fedjets")
    head = method.build()
    images = Split(torch.randn(6, 64), torch.zeros(6, dtype=torch.long))
    received = method.send(method.start(), [0], train=True)[0]
    uploaded = method.upload(make_work(method, head, images, received))
    scores = head.logit_scale * F.normalize(images.features, dim=-1) @ head.gate.t()
    torch.testing.assert_close(uploaded["ranks"], scores.softmax(-1).mean(0).detach())
    assert uploaded.keys() == method.expected(method.start(), received).keys()


def test_each_expert_is_the_mean_of_those_who_trained_it() -> None:
    method = make_method("fedjets")
    state = method.start()
    old = dict(state.shared)
    shape, gate = old["experts.0"].shape, old["gate"].shape
    ranks = torch.zeros(5)

    def upload(n: int, value: float, *experts: int) -> Upload:
        sent = {f"experts.{i}": torch.full(shape, value) for i in experts}
        return Upload({"gate": torch.full(gate, value), "ranks": ranks, **sent}, n)

    method.merge(state, {0: upload(1, 1.0, 0, 1), 1: upload(3, 5.0, 1, 2)})
    for name, value in {"gate": 4.0, "experts.0": 1.0, "experts.1": 4.0, "experts.2": 5.0}.items():
        torch.testing.assert_close(state.shared[name], torch.full_like(old[name], value))
    for name in ("experts.3", "experts.4"):
        assert torch.equal(state.shared[name], old[name])
    assert state.pool.keys() == {0, 1}


def test_a_round_trains_the_experts_that_came_and_no_other(
    federate: object, wire: list[Exchange]
) -> None:
    federate(method="fedjets", num_server_rounds=2)  # type: ignore[operator]
    trained = [e for e in wire if e.kind == "train"]
    assert len(trained) == 2 * NUM_CLIENTS
    for exchange in trained:
        came = {name for name in exchange.down if name.startswith("experts.")}
        assert len(came) == 2
        assert exchange.up.keys() == {"gate", "ranks", *came}
        assert all(not torch.equal(exchange.up[n], exchange.down[n]) for n in (*came, "gate"))
        if exchange.round == 2:
            (before,) = (e for e in trained if (e.client, e.round) == (exchange.client, 1))
            best = before.up["ranks"].argsort(descending=True, stable=True)[:2]
            assert exchange.down["which"].tolist() == sorted(best.tolist())


def test_more_experts_than_there_are_is_all_of_them() -> None:
    method = make_method("fedjets", **{"fedjets.top": 9})
    sent = method.send(method.start(), [0], train=True)[0]
    assert sent["which"].tolist() == [0, 1, 2, 3, 4]
    assert sent.keys() == {"gate", "which", *(f"experts.{i}" for i in range(5))}


def test_an_anchor_trains_one_expert_and_its_gate_to_prefer_it() -> None:
    method = make_method("fedjets", local_epochs=1, lr=0.1, **{"fedjets.anchor-rounds": 2})
    state = method.start()
    sent = method.send(state, [3, 8, 9], train=True)
    for i, expert in ((3, 3), (8, 3), (9, 4)):
        assert sent[i].keys() == {"gate", "which", "anchor", f"experts.{expert}"}
        assert sent[i]["which"].tolist() == sent[i]["anchor"].tolist() == [expert]
    assert method.expected(state, sent[3]).keys() == {"gate", "experts.3", "ranks"}
    head, start = method.build(), method.build()
    for each in (head, start):
        each.load(sent[3])
        each.train()
    images = Split(torch.randn(6, 64), torch.arange(6) % 4)
    labels = images.labels.clone()
    labels[4:] = -100
    # By hand: one expert's cross-entropy, and minus the log of what the gate gives it
    x = F.normalize(images.features.double(), dim=-1)
    texts = start.encoder(start.experts[3]).double()
    wrong = F.cross_entropy(start.logit_scale * x @ texts.t(), images.labels)
    gate = start.gate.detach().double().requires_grad_()
    given = torch.exp(start.logit_scale * x @ gate.t())
    of_gate = -(given[:, 3] / given.sum(-1)).log()
    found = method.loss(start, images.features, images.labels, sent[3])
    torch.testing.assert_close(found.double(), wrong + of_gate.mean(), rtol=1e-5, atol=1e-6)
    # Rows that fill up a batch do not count
    found = method.loss(start, images.features, labels, sent[3])
    some = F.cross_entropy(start.logit_scale * x @ texts.t(), labels) + of_gate[:4].mean()
    torch.testing.assert_close(found.double(), some, rtol=1e-5, atol=1e-6)
    work = make_work(method, head, images, sent[3])
    local.train(method, [work])
    (step,) = torch.autograd.grad(of_gate.mean(), gate)
    expected = start.gate.double() - 0.1 * step
    torch.testing.assert_close(head.gate.double(), expected, rtol=1e-4, atol=1e-6)
    moved = [not torch.equal(a, b) for a, b in zip(head.experts, start.experts, strict=True)]
    assert moved == [False, False, False, True, False]
    assert method.upload(work).keys() == {"gate", "experts.3", "ranks"}


def test_after_the_anchors_rounds_ranks_decide(federate: object, wire: list[Exchange]) -> None:
    options = {"num_server_rounds": 3, "flat": {"fedjets.anchor-rounds": 2}}
    federate(method="fedjets", **options)  # type: ignore[operator]
    for exchange in (e for e in wire if e.kind == "train"):
        came = [name for name in exchange.down if name.startswith("experts.")]
        anchored = exchange.round <= 2
        assert ("anchor" in exchange.down) == anchored
        assert len(came) == (1 if anchored else 2)
        if anchored:
            assert came == [f"experts.{exchange.client}"]
    assert all("anchor" not in e.down for e in wire if e.kind == "evaluate")
