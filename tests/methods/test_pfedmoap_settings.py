"""pFedMoAP's schedules, and every kind of prompt and gate, from end to end."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.base import Upload
from pfedmoap_flwr.methods.parts.gate import AttentionGate, LinearGate
from pfedmoap_flwr.randomness import torch_generator
from pfedmoap_flwr.runs import checkpoint
from support.federation import Exchange, Federate, make_method, make_work
from support.laws import SHORT
from support.tiny import NUM_CLIENTS


def trained(wire: list[Exchange]) -> list[Exchange]:
    return [exchange for exchange in wire if exchange.kind == "train"]


# Schedules


class WatchedSGD(torch.optim.SGD):
    """Remembers how each parameter was stepped."""

    steps: dict[str, list[float]]
    options: set[tuple[float, float]]

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            WatchedSGD.steps.setdefault(group["name"], []).append(group["lr"])
            WatchedSGD.options.add((group["momentum"], group["weight_decay"]))
        return super().step(closure)


@pytest.mark.parametrize(
    ("compat", "prompt", "options"),
    [
        ("paper", [0.002] * 5, (0, 0)),
        ("released", [1e-5, 0.002, 0.00181, 0.00131, 0.00069], (0.9, 5e-4)),
    ],
)
def test_the_schedule_of_every_client_in_every_round(
    compat: str,
    prompt: list[float],
    options: tuple[float, float],
    federate: Federate,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    WatchedSGD.steps, WatchedSGD.options = {}, set()
    monkeypatch.setattr(torch.optim, "SGD", WatchedSGD)
    federate(compat=compat, local_epochs=5, batch_size=96)
    times = 2 * NUM_CLIENTS
    assert np.round(WatchedSGD.steps.pop("ctx"), 5).tolist() == prompt * times
    assert WatchedSGD.options == {options}
    assert len(WatchedSGD.steps) == 8
    for name, rates in WatchedSGD.steps.items():
        assert name.startswith("gate.")
        assert rates == [0.01] * 5 * times


# Settings


@pytest.mark.slow
@pytest.mark.parametrize("compat", ["paper", "released"])
@pytest.mark.parametrize(
    ("changes", "shape"),
    [
        ({"prompt.class-specific": True}, (4, 4, 32)),
        ({"prompt.ctx-init": "a photo of a big"}, (5, 32)),
        ({"prompt.ctx-init": "a photo", "prompt.class-specific": True}, (4, 2, 32)),
        ({"prompt.class-token-position": "middle"}, (4, 32)),
        ({"prompt.class-token-position": "front"}, (4, 32)),
        ({"prompt.class-token-position": "middle", "prompt.class-specific": True}, (4, 4, 32)),
        ({"prompt.n-ctx": 1}, (1, 32)),
        ({"pfedmoap.gate": "none"}, (4, 32)),
        ({"pfedmoap.gate-shared": True}, (4, 32)),
        ({"pfedmoap.gate": "linear"}, (4, 32)),
        ({"pfedmoap.gate-frozen": True}, (4, 32)),
        ({"pfedmoap.score-scale": 10.0, "pfedmoap.scale-learned": True}, (4, 32)),
        ({"pfedmoap.unit-scores": True}, (4, 32)),
        ({"pfedmoap.selection": "cosine"}, (4, 32)),
        ({"pfedmoap.selection": "noise"}, (4, 32)),
        ({"pfedmoap.d-gating": 64, "pfedmoap.heads": 1}, (4, 32)),
        ({"data.shots": 1}, (4, 32)),
        ({"data.partition": "pathological"}, (4, 32)),
    ],
    ids=str,
)
def test_prompts_and_gates_of_every_kind_run_through(
    compat: str,
    changes: dict[str, Any],
    shape: tuple[int, ...],
    federate: Federate,
    wire: list[Exchange],
) -> None:
    run = federate(compat=compat, flat=changes, **SHORT)
    assert not any(record.failed for record in run.rounds())
    assert checkpoint.load(run.path).shared["ctx"].shape == shape
    for exchange in trained(wire):
        assert exchange.down["ctx"].shape == exchange.up["ctx"].shape == shape
        assert not torch.equal(exchange.down["ctx"], exchange.up["ctx"])
        if exchange.round > 1:
            assert exchange.down["experts"].shape == (2, *shape)
    if words := changes.get("prompt.ctx-init"):
        embedded = make_method("promptfl").clip.embed(words)
        assert embedded.shape == shape[-2:]
        assert torch.equal(trained(wire)[0].down["ctx"], embedded.expand(shape))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pfedmoap.d-gating": 48}, r"pfedmoap\.d-gating=48: must divide CLIP's width 64"),
        ({"pfedmoap.d-gating": 128}, r"pfedmoap\.d-gating=128: must divide CLIP's width 64"),
        ({"pfedmoap.heads": 3}, r"pfedmoap\.heads=3: must divide pfedmoap\.d-gating=32"),
    ],
)
def test_widths_that_do_not_divide_are_named_before_any_training(
    changes: dict[str, Any],
    said: str,
    federate: Federate,
    wire: list[Exchange],
    tmp_path: Path,
) -> None:
    with pytest.raises(UsageError, match=said):
        federate(flat=changes)
    assert wire == []
    assert "must divide" in (tmp_path / "run" / "error.txt").read_text()
    # Without a gate nothing has to divide
    federate("other", num_server_rounds=1, flat={**changes, "pfedmoap.gate": "none"})


def test_a_shared_gate_is_averaged_like_the_prompt(
    federate: Federate, wire: list[Exchange]
) -> None:
    run = federate(num_server_rounds=2, local_epochs=1, flat={"pfedmoap.gate-shared": True})
    server = checkpoint.load(run.path)
    uploads = {e.client: e.up for e in trained(wire) if e.round == 2}
    names = {name for name in server.shared if name.startswith("gate.")}
    assert len(names) == 8
    sizes = {
        e.client: int(e.reply.content["metrics"]["num-examples"])
        for e in trained(wire)
        if e.round == 2
    }
    assert len(set(sizes.values())) == NUM_CLIENTS
    for name in names:
        mean = torch.zeros(server.shared[name].shape, dtype=torch.float64)
        for i, n in sizes.items():
            mean += uploads[i][name].double() * (n / sum(sizes.values()))
        torch.testing.assert_close(server.shared[name], mean.float())
    # Where clients differ by far more than rounding, the mean is nobody's own
    apart = (uploads[0]["gate.out.weight"] - uploads[1]["gate.out.weight"]).abs().max()
    assert apart > 1e-4
    assert (server.shared["gate.out.weight"] - uploads[0]["gate.out.weight"]).abs().max() > 1e-5
    # What came down overwrote the client's own
    down = [e.down for e in trained(wire) if e.round == 2]
    assert all(torch.equal(d["gate.out.bias"], down[0]["gate.out.bias"]) for d in down)


# Controls and ablations


def test_the_linear_gate_is_a_mixture_by_hand() -> None:
    gate = LinearGate(4, num_experts=2, generator=torch_generator(0)).double()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    experts = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
    weight, bias = gate.weigh.weight.detach().numpy(), gate.weigh.bias.detach().numpy()
    for count in (3, 2):
        expected = np.zeros((3, 5, 4))
        for b in range(3):
            scores = np.exp(weight[:count] @ images[b].numpy() + bias[:count])
            for k in range(count):
                expected[b] += scores[k] / scores.sum() * experts[k].numpy()
        found = gate(images, experts[:count]).detach().numpy()
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_unit_scores_are_cosines_times_the_scale() -> None:
    gate = AttentionGate(8, 2, torch_generator(0), 3.0, unit=True).double()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    texts = torch.randn(3, 4, 8, generator=generator, dtype=torch.float64)
    found = gate.attention(images, texts).detach().numpy()
    query, key = gate.query(images).detach().numpy(), gate.key(texts).detach().numpy()
    for head, part in enumerate((slice(0, 4), slice(4, 8))):
        for b in range(2):
            for c in range(4):
                q, ks = query[b, part], key[:, c, part]
                cosines = ks @ q / np.linalg.norm(ks, axis=1) / np.linalg.norm(q)
                scores = np.exp(3.0 * cosines)
                np.testing.assert_allclose(found[head, b, :, c], scores / scores.sum(), atol=1e-12)


def test_a_learned_scale_starts_where_it_is_set_and_moves() -> None:
    method = make_method(
        "pfedmoap", **{"pfedmoap.score-scale": 5.0, "pfedmoap.scale-learned": True}
    )
    head = method.build()
    assert isinstance(head.gate, AttentionGate)
    assert head.gate.log_scale.exp().item() == pytest.approx(5.0)
    fixed = make_method("pfedmoap", **{"pfedmoap.score-scale": 5.0}).build()
    experts = torch.randn(2, 4, 32)
    images = torch.randn(6, 64)
    logits = []
    for one, its in ((head, method), (fixed, method)):
        one.load({"experts": experts})
        make_work(its, one)
        logits.append(one(images))
    torch.testing.assert_close(logits[0], logits[1])
    logits[0].square().sum().backward()
    assert head.gate.log_scale.grad is not None
    assert head.gate.log_scale.grad.abs() > 0


def test_a_frozen_gate_stays_as_it_starts(federate: Federate) -> None:
    run = federate(num_server_rounds=3, flat={"pfedmoap.gate-frozen": True})
    start = make_method("pfedmoap").build().state()
    for path in run.path.rglob("round-00003.safetensors"):
        kept = load_file(path)
        for name in (n for n in kept if n.startswith("gate.")):
            assert torch.equal(kept[name], start[name])
        assert not torch.equal(kept["ctx"], start["ctx"])


def test_noise_is_nobodys_prompt_and_its_own_in_every_round(
    federate: Federate, wire: list[Exchange]
) -> None:
    federate(num_server_rounds=3, flat={"pfedmoap.selection": "noise"})
    prompts = [e.up["ctx"] for e in trained(wire)]
    seen = [expert for e in trained(wire) for expert in e.down.get("experts", [])]
    assert len(seen) == 2 * NUM_CLIENTS * 2
    assert len({expert.numpy().tobytes() for expert in seen}) == len(seen)
    assert not any(torch.equal(expert, prompt) for expert in seen for prompt in prompts)
    assert torch.stack(seen).std() == pytest.approx(0.02, rel=0.1)


def test_cosine_chooses_by_direction(federate: Federate, wire: list[Exchange]) -> None:
    options = {"data.num-clients": 6, "pfedmoap.selection": "cosine"}
    federate(num_server_rounds=2, lr=0.05, flat=options)
    pool = {e.client: e.up["ctx"].double().flatten() for e in trained(wire) if e.round == 1}
    for exchange in (e for e in trained(wire) if e.round == 2):
        mine = pool[exchange.client]
        cosine = {i: float(mine @ p / mine.norm() / p.norm()) for i, p in pool.items()}
        others = sorted((i for i in pool if i != exchange.client), key=lambda i: -cosine[i])
        for expert, owner in zip(exchange.down["experts"], others[:2], strict=True):
            assert torch.equal(expert.double().flatten(), pool[owner])


# Clients that are away


def test_a_prompt_that_is_too_old_is_not_lent_and_its_client_may_borrow() -> None:
    method = make_method("pfedmoap", **{"pfedmoap.pool-max-age": 2, "pfedmoap.num-experts": 3})
    state = method.start()
    prompts = {i: torch.full((4, 32), float(i)) for i in range(4)}
    for state.round, there in enumerate([(0, 1, 2, 3), (0, 1, 2), (0, 1)]):
        method.merge(state, {i: Upload({"ctx": prompts[i]}, 1) for i in there})
    state.round = 3
    # In round 4: 3 was last there in round 1, 2 in round 2
    sent = method.send(state, [0, 3], train=True)
    assert torch.equal(sent[0]["experts"], torch.stack([prompts[1], prompts[2]]))
    assert torch.equal(sent[3]["experts"], torch.stack([prompts[2], prompts[1], prompts[0]]))
    state.round = 4
    assert torch.equal(method.send(state, [0], train=True)[0]["experts"], prompts[1][None])
    never = make_method("pfedmoap", **{"pfedmoap.num-experts": 3})
    assert len(never.send(state, [0], train=True)[0]["experts"]) == 3
