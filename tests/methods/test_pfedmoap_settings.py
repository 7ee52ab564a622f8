"""pFedMoAP's schedules, and every kind of prompt and gate, from end to end."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.runs import checkpoint
from support.federation import Exchange, Federate, make_method
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
    run = federate(num_server_rounds=3, local_epochs=1, compat=compat, flat=changes)
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
