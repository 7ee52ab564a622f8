"""Law 14: many clients at once give what one by one gives.

In threads to the bit; stacked, up to the rounding of float32.

A method that cannot be stacked trains one by one, by itself and with the same numbers.
"""

import logging
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pfedmoap_flwr.engines.in_process import Workers
from pfedmoap_flwr.federation import client
from pfedmoap_flwr.methods.base import Method, Work
from pfedmoap_flwr.runs import checkpoint
from pfedmoap_flwr.runs.heads import KeptHeads
from pfedmoap_flwr.training import local, stacked
from support.federation import (
    Federate,
    assert_same,
    make_method,
    right_images,
)
from support.laws import THREE_ROUNDS, every_method
from support.works import SIZES, assert_stacked_as_alone, made_works

# What must be stacked, or a GPU would be idle; others may fall back
STACKABLE = ("fedprox", "pfedmoap", "promptfl")


def alike(method: Method[Any, Any], works: Sequence[Work[Any]]) -> list[list[Work[Any]]]:
    """Works in groups that can be stacked."""
    groups: dict[Any, list[Work[Any]]] = {}
    for work in works:
        groups.setdefault(stacked.likeness(method, work), []).append(work)
    return list(groups.values())


def can_be_stacked(method: Method[Any, Any], works: list[Work[Any]]) -> bool:
    """Tell whether they train together, as the client's own code finds out."""
    try:
        stacked.check_stackable(stacked.Stack(method, works), *local.first_images(works, 2))
        losses = stacked.Stack(method, works).losses(*local.first_images(works, 2))
        losses.sum().backward()
    except (ValueError, RuntimeError):
        return False
    return True


@every_method
@pytest.mark.parametrize("compat", ["paper", "released"])
def test_14_stacked_heads_train_as_each_alone(method: str, compat: str) -> None:
    made = make_method(method, compat=compat, lr=0.02, local_epochs=3)
    alone, joint = (made_works(made) for _ in range(2))
    start = [work.head.state() for work in alone]
    losses: dict[int, float | None] = {}
    joint_losses: dict[int, float | None] = {}
    for work in alone:
        losses |= local.train(made, [work])
    groups = alike(made, joint)
    assert max(map(len, groups)) > 1
    for group in groups:
        if len(group) > 1 and not can_be_stacked(made, group):
            assert method not in STACKABLE
            return
        joint_losses |= local.train(made, group)
    assert joint_losses.keys() == losses.keys() == set(range(len(SIZES)))
    for one, other, before in zip(alone, joint, start, strict=True):
        if not list(one.head.parameters()):
            assert joint_losses[one.client_id] is None
            continue
        assert joint_losses[one.client_id] == pytest.approx(losses[one.client_id], rel=1e-4)
        torch.testing.assert_close(other.head.state(), one.head.state(), rtol=1e-3, atol=1e-5)
        after = {name: t.double() for name, t in one.head.state().items() if t.numel()}
        moved = [(t - before[name].double()).abs().max() for name, t in after.items()]
        assert max(moved) > 1e-4


def test_14_prompts_of_every_class_can_be_stacked() -> None:
    made = make_method("promptfl", **{"prompt.class-specific": True})
    assert_stacked_as_alone(made, rtol=1e-4, atol=1e-6)


def test_14_the_order_of_clients_has_no_say_in_their_batches() -> None:
    made = make_method("promptfl")
    one, other = made_works(made), made_works(made)
    local.train(made, one)
    local.train(made, other[::-1])
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a.head.state(), b.head.state(), rtol=1e-4, atol=1e-5)


# In the federation


@pytest.fixture
def stacking(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stack clients on the CPU too; the list gets the number of heads of every training."""
    counts: list[int] = []
    train, side_by_side = local.train, Workers.side_by_side

    def counted(method: Any, works: Any, phases: Any = None) -> Any:
        counts.append(len(works))
        return train(method, works, phases)

    def jointly(self: Workers, requests: Any, at_once: int) -> Any:
        if requests[0][0].metadata.message_type != "train" or at_once == 1:
            return side_by_side(self, requests, 1)
        slices = [requests[i : i + at_once] for i in range(0, len(requests), at_once)]
        return [reply for part in slices for reply in client.answer(part)]

    monkeypatch.setattr(local, "train", counted)
    monkeypatch.setattr(Workers, "side_by_side", jointly)
    return counts


@every_method
def test_14_threads_change_no_bit(
    method: str, reference: Federate, federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"method": method, **THREE_ROUNDS}
    names = set()
    open_client = client.open_client

    def noted(*arguments: Any) -> Any:
        names.add(threading.current_thread().name)
        return open_client(*arguments)

    expected = reference(**options)
    monkeypatch.setattr(client, "open_client", noted)
    assert_same(federate("threads/run", clients_at_once=3, **options), expected)
    assert len(names) > 1
    assert torch.get_num_threads() == 1


@every_method
def test_14_a_stacked_federation_is_the_same_up_to_float_error(
    method: str, reference: Federate, federate: Federate, stacking: list[int]
) -> None:
    options = {"method": method, **THREE_ROUNDS}
    expected = reference(**options)
    stacking.clear()
    run = federate("stacked/run", clients_at_once=3, **options)
    assert max(stacking) == 3 or method not in STACKABLE
    one, other = checkpoint.load(expected.path), checkpoint.load(run.path)
    torch.testing.assert_close(other.shared, one.shared, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(other.pool, one.pool, rtol=1e-3, atol=1e-4)
    assert right_images(run) == pytest.approx(right_images(expected), abs=1)
    for record, before in zip(run.rounds(), expected.rounds(), strict=True):
        if before.train_loss is not None:
            assert record.train_loss == pytest.approx(before.train_loss, rel=1e-3)
        assert (record.bytes_down, record.bytes_up) == (before.bytes_down, before.bytes_up)


@pytest.mark.slow
@pytest.mark.parametrize("method", STACKABLE)
def test_14_a_stacked_federation_repeats_itself_bit_by_bit(
    method: str, federate: Federate, stacking: list[int]
) -> None:
    options = {"method": method, "clients_at_once": 4, "local_epochs": 1}
    assert_same(federate("first/run", **options), federate("second/run", **options))
    assert max(stacking) == 4


@pytest.mark.slow
def test_14_a_method_that_cannot_be_stacked_trains_one_by_one(
    federate: Federate, stacking: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def curious(self: Any, head: Any, features: Any, labels: Any, received: Any) -> Tensor:
        loss = F.cross_entropy(head(features), labels)
        return loss if loss.item() > 0 else 2 * loss

    check_falls_back(curious, federate, stacking, monkeypatch)


@pytest.mark.slow
def test_14_a_loss_that_counts_rows_is_found_out(
    federate: Federate, stacking: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def counting(self: Any, head: Any, features: Any, labels: Any, received: Any) -> Tensor:
        return F.cross_entropy(head(features), labels, reduction="sum") / len(labels)

    check_falls_back(counting, federate, stacking, monkeypatch)


def check_falls_back(
    loss: Any, federate: Federate, stacking: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Method, "loss", loss)
    logging.getLogger("flwr").propagate = True
    expected = federate("one/run", clients_at_once=1)
    stacking.clear()
    assert_same(federate("stacked/run", clients_at_once=4), expected)
    assert set(stacking) == {1}


@pytest.mark.slow
def test_14_a_client_that_raises_leaves_the_others_their_training(
    federate: Federate, stacking: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    train = local.train

    def fragile(method: Any, works: Any, phases: Any = None) -> Any:
        if works[0].round == 2 and 1 in [work.client_id for work in works]:
            raise torch.OutOfMemoryError("no memory left")
        return train(method, works, phases)

    expected = federate("one/run", clients_at_once=1)
    monkeypatch.setattr(local, "train", fragile)
    run = federate("failed/run", clients_at_once=4)
    (said,) = run.rounds()[2].failed.values()
    assert "no memory left" in said
    pools = [checkpoint.load(r.path).pool for r in (expected, run)]
    for number in (0, 2, 3):
        torch.testing.assert_close(pools[1][number], pools[0][number], rtol=1e-4, atol=1e-5)


def test_14_a_client_that_cannot_be_opened_fails_alone(
    federate: Federate, stacking: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = KeptHeads.load

    def closed(self: KeptHeads, *, before: int, trained: int = 0) -> Any:
        if (self.folder.name, before) == ("client-2", 2):
            raise RuntimeError("cannot be opened")
        return load(self, before=before, trained=trained)

    monkeypatch.setattr(KeptHeads, "load", closed)
    run = federate("run", clients_at_once=4)
    reason = "RuntimeError: cannot be opened"
    said = [{}, {2: f"evaluate: {reason}"}, {2: f"train: {reason}"}]
    assert [record.failed for record in run.rounds()] == said
    assert max(stacking) >= 3
