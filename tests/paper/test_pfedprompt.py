"""pFedPrompt, nearest version: a common prompt, and a memory of one's own training images."""

import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pfedmoap_flwr import config
from pfedmoap_flwr.clip.features import Reading
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.base import Split
from pfedmoap_flwr.methods.pfedprompt import PFedPrompt
from pfedmoap_flwr.training import local
from pfedmoap_flwr.training.node import node_of
from support.federation import Exchange, Federate, make_method, make_work, tensor_files
from support.laws import THREE_ROUNDS
from support.tiny import NUM_CLIENTS, TINY

WEIGHTS = {"pfedprompt.alpha": 2.0, "pfedprompt.beta": 3.0}


def images(count: int) -> Split:
    features = torch.randn(count, 64, generator=torch.Generator().manual_seed(count))
    return Split(features, torch.arange(count) % 3)


def test_the_votes_by_hand() -> None:
    method = make_method("pfedprompt", **WEIGHTS)
    head = method.build().double()
    axis = torch.eye(64, dtype=torch.float64)
    # Features of any length: the memory compares directions
    memory = Split(torch.stack([5 * axis[0], axis[1], -axis[0]]), torch.tensor([2, 0, 2]))
    method.adapt(make_work(method, head, memory))
    seen = torch.stack([0.1 * axis[0], axis[0] + axis[1]])
    half = math.exp(-3 * (1 - 0.5**0.5))
    expected = [
        # cosines 1, 0, -1
        [math.exp(-3), 0.0, 1 + math.exp(-6), 0.0],
        # cosines 1/sqrt(2), 1/sqrt(2), -1/sqrt(2)
        [half, 0.0, half + math.exp(-3 * (1 + 0.5**0.5)), 0.0],
    ]
    votes = head.recall(seen)
    torch.testing.assert_close(votes, torch.tensor(expected, dtype=torch.float64))


def test_the_personal_model_is_the_common_prompt_with_the_memory() -> None:
    method = make_method("pfedprompt", **WEIGHTS)
    head, plain = method.build(), make_method("promptfl").build()
    seen = images(7).features
    # Before it is adapted there is no memory
    assert torch.equal(head(seen), plain(seen))
    received = {"ctx": plain.ctx.detach().clone()}
    head.ctx.data.add_(1)
    method.adapt(make_work(method, head, images(5), received))
    torch.testing.assert_close(head(seen), plain(seen) + 2.0 * head.recall(seen))
    assert head.recall(seen).abs().max() > 1e-2
    # Without images there is nothing to remember
    method.adapt(make_work(method, head, None, received))
    assert torch.equal(head(seen), plain(seen))


def test_training_is_promptfls() -> None:
    data = images(20)
    trained = []
    for name in ("pfedprompt", "promptfl"):
        method = make_method(name)
        head = method.build()
        losses = local.train(method, [make_work(method, head, data)])
        trained.append((head.ctx, losses))
    assert torch.equal(trained[0][0], trained[1][0])
    assert trained[0][1] == trained[1][1]


def test_the_prompt_alone_travels_and_the_memory_is_not_even_kept(
    federate: Federate, wire: list[Exchange]
) -> None:
    run = federate(method="pfedprompt", num_server_rounds=1)
    assert {name for e in wire for name in (*e.up, *e.down)} == {"ctx"}
    kept = sorted(run.path.rglob("round-00001.safetensors"))
    assert len(kept) == NUM_CLIENTS
    assert all(load_file(path).keys() == {"ctx"} for path in kept)


def test_every_client_remembers_its_own_training_images(
    federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    memories: dict[tuple[int, int], Any] = {}
    adapt = PFedPrompt.adapt

    def noted(self: Any, work: Any) -> None:
        adapt(self, work)
        memories[work.client_id, work.round] = work.head.keys, work.head.values

    monkeypatch.setattr(PFedPrompt, "adapt", noted)
    federate(method="pfedprompt", num_server_rounds=1)
    settings = config.parse(TINY)
    node = node_of(settings.clip, settings.data, settings.seed, "cpu", Reading())
    assert memories.keys() == {(i, r) for i in range(NUM_CLIENTS) for r in (0, 1)}
    for (client_id, _), (keys, values) in memories.items():
        own = node.split(client_id, "train")
        torch.testing.assert_close(keys, own.features / own.features.norm(dim=-1, keepdim=True))
        assert torch.equal(values.argmax(-1), own.labels)
        assert torch.equal(values.sum(-1), torch.ones(len(own)))


@pytest.mark.slow
def test_9_the_memory_changes_what_is_measured_as_personal_and_nothing_else(
    reference: Federate,
    federate: Federate,
) -> None:
    theirs = reference(method="promptfl", **THREE_ROUNDS)
    runs = {
        alpha: federate(
            f"{alpha}/run", method="pfedprompt", flat={"pfedprompt.alpha": alpha}, **THREE_ROUNDS
        )
        for alpha in (0.0, 50.0)
    }
    for run in runs.values():
        assert tensor_files(run) == tensor_files(theirs)
        for record, plain in zip(run.rounds(), theirs.rounds(), strict=True):
            assert record.train_loss == plain.train_loss
            assert record.mean("global-accuracy") == plain.mean("global-accuracy")
    # Without weight, the personal model is P_g
    for record in runs[0.0].rounds():
        for measured in record.clients.values():
            assert measured["personal-accuracy"] == measured["global-accuracy"]
    last = runs[50.0].rounds()[-1]
    assert last.mean("personal-accuracy") != last.mean("global-accuracy")


def test_a_memory_without_sharpness_is_refused() -> None:
    with pytest.raises(UsageError, match=r"pfedprompt\.beta=0: must be > 0"):
        make_method("pfedprompt", **{"pfedprompt.beta": 0})
