"""Many clients at once give what one by one gives: in threads to the bit, stacked to rounding."""

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from conftest import CLASSNAMES, TINY, assert_same, rounds, tensor_files
from torch import Tensor
from torch.nn import functional as F

from pfedmoap_flwr import config, methods
from pfedmoap_flwr.clip.load import load_clip
from pfedmoap_flwr.federation import parallel
from pfedmoap_flwr.federation.parallel import train_stacked
from pfedmoap_flwr.methods.base import Method, Task
from pfedmoap_flwr.runs import checkpoint
from pfedmoap_flwr.runs.folder import RunFolder
from pfedmoap_flwr.training import local, stacked
from pfedmoap_flwr.training.local import Split, Training

Federate = Callable[..., RunFolder]
every_method = pytest.mark.parametrize("method", methods.names())
SIZES = (20, 9, 24, 8, 3)  # batches of 8: whole ones, a rest, less than one


def made_method(name: str, **changes: Any) -> Method:
    settings = config.parse({**TINY, "method": name, "local-epochs": 3, **changes})
    return methods.load(name)(settings)


def made_trainings(
    method: Method, sizes: Sequence[int] = SIZES, num_experts: int | None = 2
) -> list[Training]:
    """Clients that differ in their prompt, their images and, where they borrow, their experts."""
    clip = load_clip("tiny", "tiny", "cpu")
    generator = torch.Generator().manual_seed(0)
    trainings = []
    for number, size in enumerate(sizes):
        head = method.build(clip, Task(tuple(CLASSNAMES), "a {}."))
        received = {
            name: t + 0.1 * torch.randn(t.shape, generator=generator)
            for name, t in head.named_parameters()
        }
        if hasattr(head, "experts") and num_experts is not None:
            received["experts"] = torch.randn((num_experts, 4, 32), generator=generator)
        received = {name: tensor.detach() for name, tensor in received.items()}
        head.receive(received)
        features = F.normalize(torch.randn(size, 64, generator=generator), dim=-1)
        labels = torch.randint(0, 4, (size,), generator=generator)
        trainings.append(Training(number, head, Split(features, labels), received))
    return trainings


def tensors(training: Training) -> dict[str, Tensor]:
    return training.head.kept()


@every_method
@pytest.mark.parametrize("compat", ["paper", "released"])
@pytest.mark.parametrize("num_experts", [None, 0, 2])
def test_stacked_heads_train_as_each_alone(
    method: str, compat: str, num_experts: int | None
) -> None:
    made = made_method(method, compat=compat, lr=0.02)
    alone, joint = (made_trainings(made, num_experts=num_experts) for _ in range(2))
    start = [tensors(training) for training in alone]
    losses = {}
    for training in alone:
        losses |= local.train(made, [training], 4)
    joint_losses = local.train(made, joint, 4)
    assert joint_losses.keys() == losses.keys() == set(range(len(SIZES)))
    for one, other, before in zip(alone, joint, start, strict=True):
        if method == "zeroshot":
            assert joint_losses[one.client] is None
        else:
            assert joint_losses[one.client] == pytest.approx(losses[one.client], rel=1e-5)
        torch.testing.assert_close(tensors(other), tensors(one), rtol=1e-4, atol=1e-6)
        for name, parameter in one.head.named_parameters():
            if name == "ctx" or (name == "gate.out.weight" and num_experts is not None):
                assert (parameter - before[name]).abs().max() > 1e-4, name


def test_prompts_of_every_class_can_be_stacked() -> None:
    made = made_method("pfedmoap", **{"prompt.class-specific": True})
    alone, joint = (made_trainings(made, num_experts=None) for _ in range(2))
    for training in alone:
        local.train(made, [training], 1)
    local.train(made, joint, 1)
    for one, other in zip(alone, joint, strict=True):
        torch.testing.assert_close(tensors(other), tensors(one), rtol=1e-4, atol=1e-6)


def test_the_order_of_clients_has_no_say_in_their_batches() -> None:
    made = made_method("promptfl")
    one, other = made_trainings(made), made_trainings(made)
    local.train(made, one, 1)
    local.train(made, other[::-1], 1)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(tensors(a), tensors(b), rtol=1e-4, atol=1e-5)


# In the federation


@pytest.fixture
def stacking(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stack clients on the CPU too; the list gets the number of heads of every training."""
    counts: list[int] = []
    train, side_by_side = local.train, parallel._side_by_side

    def counted(method: Any, trainings: Any, server_round: int) -> Any:
        counts.append(len(trainings))
        return train(method, trainings, server_round)

    def stacked(answer: Any, requests: Any, at_once: int) -> Any:
        if requests[0][0].metadata.message_type != "train" or at_once == 1:
            return side_by_side(answer, requests, 1)
        slices = [requests[i : i + at_once] for i in range(0, len(requests), at_once)]
        return [reply for part in slices for reply in train_stacked(answer, part)]

    monkeypatch.setattr(local, "train", counted)
    monkeypatch.setattr(parallel, "_side_by_side", stacked)
    return counts


@every_method
def test_threads_change_no_bit(
    method: str, federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"method": method, "num_server_rounds": 3, "fraction_train": 0.75}
    names = set()
    answer = parallel.client.awake

    def noted(*arguments: Any) -> Any:
        names.add(threading.current_thread().name)
        return answer(*arguments)

    expected = federate("one/run", clients_at_once=1, **options)
    monkeypatch.setattr(parallel.client, "awake", noted)
    assert_same(federate("threads/run", clients_at_once=3, **options), expected)
    assert len(names) > 1
    assert torch.get_num_threads() == 1


@every_method
def test_a_stacked_federation_is_the_same_up_to_float_error(
    method: str, federate: Federate, stacking: list[int]
) -> None:
    options = {"method": method, "num_server_rounds": 3, "fraction_train": 0.75}
    expected = federate("one/run", clients_at_once=1, **options)
    stacking.clear()
    run = federate("stacked/run", clients_at_once=3, **options)
    # First-timers have no experts, so they are of another kind
    assert sum(stacking) == 9
    assert max(stacking) == 3
    one, other = checkpoint.load(expected.path), checkpoint.load(run.path)
    torch.testing.assert_close(other.shared, one.shared, rtol=1e-4, atol=1e-5)
    for number, entry in one.pool.items():
        torch.testing.assert_close(other.pool[number], entry, rtol=1e-4, atol=1e-5)
    for record, before in zip(run.rounds(), expected.rounds(), strict=True):
        assert record.clients == before.clients
        if before.train_loss is not None:
            assert record.train_loss == pytest.approx(before.train_loss, rel=1e-4)
        assert (record.bytes_down, record.bytes_up) == (before.bytes_down, before.bytes_up)


@every_method
def test_a_stacked_federation_repeats_itself_bit_by_bit(
    method: str, federate: Federate, stacking: list[int]
) -> None:
    options = {"method": method, "clients_at_once": 4, "local_epochs": 1}
    assert_same(federate("first/run", **options), federate("second/run", **options))
    assert max(stacking) == 4


def test_a_method_that_cannot_be_stacked_trains_one_by_one(
    federate: Federate,
    stacking: list[int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def curious(self: Any, head: Any, features: Any, labels: Any, received: Any) -> Tensor:
        loss = F.cross_entropy(head(features), labels)
        return loss if loss.item() > 0 else 2 * loss

    check_falls_back(curious, federate, stacking, monkeypatch)


def test_a_loss_that_counts_rows_is_found_out(
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


def test_a_client_that_raises_leaves_the_others_their_training(
    federate: Federate, stacking: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    train = local.train

    def fragile(method: Any, trainings: Any, server_round: int) -> Any:
        if server_round == 2 and 1 in [training.client for training in trainings]:
            raise torch.OutOfMemoryError("no memory left")
        return train(method, trainings, server_round)

    expected = federate("one/run", clients_at_once=1)
    monkeypatch.setattr(local, "train", fragile)
    run = federate("failed/run", clients_at_once=4)
    (said,) = run.rounds()[2].failed.values()
    assert "no memory left" in said
    pools = [checkpoint.load(r.path).pool for r in (expected, run)]
    for number in (0, 2, 3):
        torch.testing.assert_close(pools[1][number], pools[0][number], rtol=1e-4, atol=1e-5)


def test_a_client_that_cannot_be_woken_fails_alone(federate: Federate, stacking: list[int]) -> None:
    run = federate("run", clients_at_once=4, num_server_rounds=1)
    (kept,) = run.path.rglob("client-2/round-00001.safetensors")
    kept.write_bytes(b"torn")
    settings = {"resume": str(run.path), "num-server-rounds": 2}
    from pfedmoap_flwr.cli.main import execute, make_plan

    console: Any = None
    execute(make_plan(settings), console, in_process=True)
    assert list(run.rounds()[2].failed) == [2]
    assert max(stacking) == 4


# How many


def test_saved_bytes_grow_by_the_same_for_every_head() -> None:
    made = made_method("pfedmoap")
    batch = local.first_images(made_trainings(made, (8,) * 4), 8)
    sizes = []
    for count in (2, 3, 4):
        stack = local.stacked(made, made_trainings(made, (8,) * 4)[:count])
        features, labels = (tensor[:count] for tensor in batch)
        sizes.append(stacked.saved_bytes(stack, features, labels, without=set()))
    assert sizes[1] - sizes[0] == sizes[2] - sizes[1] > 0


def test_memory_decides_how_many_fit(federate: Federate, monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []
    side_by_side = parallel._side_by_side

    def noted(answer: Any, requests: Any, at_once: int) -> Any:
        widths.append(at_once)
        return side_by_side(answer, requests, at_once)

    monkeypatch.setattr(parallel, "_side_by_side", noted)
    monkeypatch.setattr(parallel, "cores", lambda: 3)
    for memory, expected in ((1, 1), (10**12, 3)):
        widths.clear()
        monkeypatch.setattr(parallel, "memory", lambda device, memory=memory: memory)
        federate(f"{memory}/run", clients_at_once=0, num_server_rounds=1)
        # evaluation, training, evaluation
        assert widths == [3, expected, 3]


def test_what_a_step_keeps_is_counted_without_the_frozen_weights() -> None:
    made = made_method("promptfl")
    (training,) = made_trainings(made, (8,))
    stack = local.stacked(made, [training])
    batch = local.first_images([training], 8)
    weights = list(load_clip("tiny", "tiny", "cpu").model.parameters())
    places = {p.untyped_storage().data_ptr() for p in weights}
    with_all = stacked.saved_bytes(stack, *batch, without=set())
    without = stacked.saved_bytes(stack, *batch, without=places)
    used = sum(p.untyped_storage().nbytes() for p in weights)
    assert 0 < without < with_all <= without + used


@every_method
def test_rounds_do_not_depend_on_how_many_at_once(method: str, federate: Federate) -> None:
    runs = [federate(f"{n}/run", method=method, clients_at_once=n) for n in (1, 2)]
    assert rounds(runs[0]) == rounds(runs[1])
    assert tensor_files(runs[0]) == tensor_files(runs[1])
