"""The laws: what must hold for every method, one that is added tomorrow included.

Laws 3, 4 and 5 are in test_laws_of_accidents; law 6, Ray equals in-process, where Ray is started.
"""

import ast
import copy
import dataclasses
import functools
import json
import random
import re
import tomllib
from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array
from pydantic.fields import FieldInfo
from torch import Tensor

from pfedmoap_flwr import config, methods
from pfedmoap_flwr.clip import load
from pfedmoap_flwr.clip.features import read_images
from pfedmoap_flwr.data import federated as federated_module
from pfedmoap_flwr.data.images import load_images
from pfedmoap_flwr.data.partition import partition
from pfedmoap_flwr.federation import messages
from pfedmoap_flwr.methods.base import Head, Method, Split, Upload
from pfedmoap_flwr.runs import checkpoint
from pfedmoap_flwr.settings import choices
from pfedmoap_flwr.training import local
from support import ROOT
from support.federation import (
    Federate,
    Recorded,
    assert_same,
    forget_data,
    kept_head,
    make_method,
    make_work,
    right_images,
    rounds,
)
from support.laws import SHORT, THREE_ROUNDS, every_method
from support.tiny import NUM_CLIENTS, TINY

# Law 1


@every_method
def test_1_what_travels_and_what_is_personal_are_disjoint_and_all(
    method: str, recorded: Callable[..., Recorded]
) -> None:
    made = make_method(method)
    head = made.build()
    trainable = {name for name, _ in head.named_parameters()}
    personal = {name for name in trainable if made.is_personal(name)}
    shared, reports = made.shared(head).keys(), made.reports().keys()
    for entry in made.personal:
        assert any(name == entry or name.startswith(f"{entry}.") for name in trainable), entry
    assert shared | personal == trainable
    assert shared & personal == set()
    assert reports & trainable == set()
    three = recorded(method=method, **THREE_ROUNDS)
    trained = [exchange for exchange in three.wire if exchange.kind == "train"]
    assert len(trained) == 3 * 3
    for exchange in trained:
        # FedSPA's clients alone upload a shared tensor that did not come down in that round
        assert exchange.up.keys() == made.expected(made.start(), exchange.down).keys()
        assert exchange.up.keys() <= shared | reports
        if method != "fedspa":
            assert exchange.up.keys() == (exchange.down.keys() & shared) | reports
    for exchange in three.wire:
        assert exchange.down.keys() & personal == set()
    state = checkpoint.load(three.run.path)
    assert state.shared.keys() == shared
    for tensors in (state.extra, *state.pool.values()):
        assert tensors.keys() & personal == set()


# Law 2


@every_method
def test_2_a_repeat_is_bitwise_equal_and_another_seed_is_not(
    method: str, reference: Federate, federate: Federate
) -> None:
    torch.manual_seed(1)
    options = {"method": method, **THREE_ROUNDS}
    first = reference(**options)
    another = federate("another/run", **{**options, "seed": 5, "num_server_rounds": 1})
    torch.manual_seed(2)
    np.random.seed(2)  # noqa: NPY002 - what a careless method might draw from
    random.seed(2)
    assert_same(first, federate("second/run", **options))
    assert rounds(first)[:2] != rounds(another)


@every_method
def test_2_every_start_follows_the_seed(method: str) -> None:
    head, same, other = (make_method(method, seed=seed).build() for seed in (0, 0, 5))
    twins, others = dict(same.named_parameters()), dict(other.named_parameters())
    for name, parameter in head.named_parameters():
        assert torch.equal(parameter, twins[name])
        # A start of equal numbers, such as a moment's, is the same for every seed
        constant = bool((parameter == parameter.flatten()[0]).all())
        assert torch.equal(parameter, others[name]) == constant, name


def order_of_images(seed: int, number: int, server_round: int) -> tuple[int, ...]:
    """The images of a training in the order in which the loss sees them."""
    method = make_method("promptfl", seed=seed, batch_size=7)
    seen: list[int] = []

    def loss(head: Head, features: Tensor, labels: Tensor, received: Any) -> Tensor:
        seen.extend(labels.tolist())
        return features.sum() * sum(parameter.sum() for parameter in head.parameters())

    method.loss = loss
    data = Split(torch.ones(20, 64), torch.arange(20))
    work = make_work(method, method.build(), data, client_id=number, server_round=server_round)
    local.train(method, [work])
    first, second = seen[:20], seen[20:]
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second
    return tuple(seen)


def test_2_seed_client_and_round_decide_the_order_of_images() -> None:
    keys = [(seed, number, r) for seed in (0, 1) for number in (0, 1) for r in (1, 2)]
    torch.manual_seed(1)
    orders = [order_of_images(*key) for key in keys]
    torch.manual_seed(2)
    assert [order_of_images(*key) for key in keys] == orders
    assert len(set(orders)) == len(keys)


# Law 7


@pytest.fixture(scope="module")
def untouched() -> str:
    """The fingerprint of the tiny CLIP as it was read from disk, before any run."""
    load.forget_clip()
    return make_method("promptfl").clip.fingerprint


@every_method
def test_7_clip_does_not_change(method: str, untouched: str, federate: Federate) -> None:
    federate(method=method, **SHORT)
    used = make_method(method).clip
    # A twin has no fingerprint yet, so it is computed from the weights as they are now
    assert dataclasses.replace(used).fingerprint == untouched
    assert {p.grad for p in used.model.parameters()} == {None}
    assert not any(module.training for module in used.model.modules())


# Law 8


@pytest.fixture
def renumbered(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[list[int]], None]]:
    """Let client i hold what client order[i] would hold, and draw what it would draw."""

    def renumber(order: list[int]) -> None:
        def permuted(*arguments: Any) -> list[Any]:
            clients = partition(*arguments)
            return [dataclasses.replace(clients[who], client_id=i) for i, who in enumerate(order)]

        generator = Method.generator

        def drawn(self: Any, name: str, client_id: int, round: int) -> torch.Generator:
            return generator(self, name, order[client_id], round)

        forget_data()
        monkeypatch.setattr(federated_module, "partition", permuted)
        monkeypatch.setattr(Method, "generator", drawn)

    yield renumber
    forget_data()


@every_method
def test_8_renumbering_clients_renumbers_results(
    method: str, federate: Federate, renumbered: Callable[[list[int]], None]
) -> None:
    order = [2, 0, 3, 1]
    options = {"method": method, "num_server_rounds": 3, "batch_size": 96}
    options |= {"local_epochs": 1, "lr": 0.02}
    first = federate("first", **options)
    renumbered(order)
    second = federate("second", **options)
    one, other = checkpoint.load(first.path), checkpoint.load(second.path)
    near = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-5)
    near(other.shared, one.shared)
    near(other.pool, {i: one.pool[who] for i, who in enumerate(order) if who in one.pool})
    for i, who in enumerate(order):
        near(kept_head(second, i), kept_head(first, who))
    right = {(r, order[i], name): count for (r, i, name), count in right_images(second).items()}
    assert right == pytest.approx(right_images(first), abs=1)
    # Clients that learn anything differ by more than is tolerated, so a mix-up would show
    heads = [kept_head(first, i) for i in range(NUM_CLIENTS)]
    for one_head, other_head in combinations(heads, 2):
        apart = [(t.double() - other_head[n].double()).abs().max() for n, t in one_head.items()]
        assert not apart or max(apart) > 1e-4


# Law 9: neutral settings collapse; those of one method alone stand with that method's tests


@pytest.mark.slow
@pytest.mark.parametrize("compat", ["paper", "released"])
@pytest.mark.parametrize("num_experts", [0, 2])
def test_9_pfedmoap_without_gate_and_with_lambda_1_trains_the_prompt_of_promptfl(
    compat: str, num_experts: int, reference: Federate, federate: Federate
) -> None:
    options = {**THREE_ROUNDS, "compat": compat}
    neutral = {"pfedmoap.gate": "none", "pfedmoap.lambda": 1.0}
    neutral["pfedmoap.num-experts"] = num_experts
    theirs = reference(method="promptfl", **options)
    ours = federate("ours", method="pfedmoap", flat=neutral, **options)
    one, other = checkpoint.load(ours.path), checkpoint.load(theirs.path)
    assert torch.equal(one.shared["ctx"], other.shared["ctx"])
    assert not torch.equal(one.shared["ctx"], one.pool[0]["ctx"])
    for number in range(NUM_CLIENTS):
        assert torch.equal(kept_head(ours, number)["ctx"], kept_head(theirs, number)["ctx"])


# Law 10


@every_method
def test_10_the_bytes_declared_are_the_bytes_sent(
    method: str, recorded: Callable[..., Recorded]
) -> None:
    three = recorded(method=method, **THREE_ROUNDS)
    down: dict[int, dict[int, int]] = {0: {}, 1: {}, 2: {}, 3: {}}
    up = copy.deepcopy(down)
    for exchange in three.wire:
        # Nothing else that could hold numbers by the thousand
        assert exchange.message.content.keys() == {"arrays", "config"}
        if exchange.kind == "train":
            assert exchange.reply.content.keys() == {"arrays", "metrics"}
            for sent, content in ((down, exchange.message.content), (up, exchange.reply.content)):
                arrays = content["arrays"].values()
                size = sum(array.numpy().nbytes for array in arrays)
                sent[exchange.round][exchange.client] = size
    records_ = three.run.rounds()
    assert {record.round: record.bytes_down for record in records_} == down
    assert {record.round: record.bytes_up for record in records_} == up
    summary = json.loads((three.run.path / "summary.json").read_text())
    assert summary["bytes_down"] == sum(sum(sizes.values()) for sizes in down.values())
    assert summary["bytes_up"] == sum(sum(sizes.values()) for sizes in up.values())


# Law 11

ALONE = {"prompt.template"}
"""What is refused beside other settings; the law holds for it in tests/methods."""

OF_A_FORM = {
    "data.window": "-160:240",
    "data.group-pattern": '/(p[0-9]+)_"\\w',
    "eval.metrics": "f1, ece",
}
"""Texts that cannot be any."""


def another(field: FieldInfo) -> Any:
    """A value of the same type that is not the default."""
    value = field.default
    if allowed := choices(field):
        return next(choice for choice in allowed if choice != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return 'C:\\runs\\"a {}"\t\n=# ä'
    return value + 1 if isinstance(value, int) else value * 0.7 or 0.7


def changed(method: str) -> dict[str, Any]:
    """A flat configuration in which no setting, of any method, has its default but ALONE."""
    every = config.known_fields(methods.names())
    flat = {key: another(field) for key, field in every.items()}
    return flat | {key: every[key].default for key in ALONE} | OF_A_FORM | {"method": method}


@every_method
def test_11_settings_survive_being_written_and_read(method: str) -> None:
    flat = changed(method)
    settings = config.parse(flat)
    every = config.known_fields(methods.names())
    defaults = {key: field.default for key, field in every.items()}
    assert settings.flat() == flat
    assert flat.keys() == defaults.keys() == config.known_keys().keys()
    assert {key for key in flat if flat[key] == defaults[key]} <= {"method"} | ALONE
    assert config.parse(settings.flat()) == settings
    toml = tomllib.loads(config.toml(settings.flat()))
    flat_again = {
        f"{name}.{key}" if isinstance(value, dict) else name: inner
        for name, value in toml.items()
        for key, inner in (value.items() if isinstance(value, dict) else [("", value)])
    }
    assert config.parse(flat_again) == settings
    assert settings != config.parse({"method": method})


# Law 12


@every_method
def test_12_clients_share_no_part_of_a_message(
    method: str, recorded: Callable[..., Recorded]
) -> None:
    wire = recorded(method=method, **THREE_ROUNDS).wire
    messages = [m for exchange in wire for m in (exchange.message, exchange.reply)]
    parts: list[Any] = list(messages)
    for message in messages:
        parts += [message.metadata, message.content, *message.content.values()]
        parts += [a for arrays in message.content.array_records.values() for a in arrays.values()]
    assert len({id(part) for part in parts}) == len(parts)
    # Copied together, what they share they share in the copies too; other laws read the messages
    first, *others = copy.deepcopy([message.content for message in messages])
    for arrays in first.array_records.values():
        for name, array in arrays.items():
            arrays[name] = Array(np.full_like(array.numpy(), 7))
            array.data = b"spoilt"
    first["config"]["round"] = 7
    assert others == [message.content for message in messages[1:]]


@every_method
def test_12_the_server_and_its_messages_share_no_storage(method: str) -> None:
    made = make_method(method)
    server, head = made.start(), made.build()
    sent = messages.to_arrays(made.send(server, [0], train=True)[0])
    received = messages.to_tensors(sent)
    head.load(received)
    work = make_work(made, head, few_images(made), received)
    made.merge(server, {0: Upload(made.upload(work), 1)})
    state = [server.shared, server.extra, *server.pool.values(), dict(head.named_parameters())]
    pointers = [t.data_ptr() for tensors in [received, *state] for t in tensors.values()]
    assert len(set(pointers)) == len(pointers)
    for tensors in state:
        for tensor in tensors.values():
            tensor.data.fill_(7)
    torch.testing.assert_close(messages.to_tensors(sent), received, rtol=0, atol=0)
    assert not any((tensor == 7).any() for tensor in received.values())


# Law 13


def overfitting(method: str) -> dict[str, Any]:
    """Settings with which a method can overfit, where its tests or its own file names any.

    A method that holds its clients back, as by a pull, must be let go for it.
    """
    path = methods.outside.files().get(method, ROOT / "tests" / "paper" / f"test_{method}.py")
    source = path.read_text() if path.is_file() else ""
    found = re.search(r"^OVERFITTING = (.*)$", source, flags=re.MULTILINE)
    return dict(ast.literal_eval(found[1])) if found else {}


def few_images(method: Method[Any, Any]) -> Split:
    """Two training images of each class, as the method reads them."""
    images = load_images(config.parse(TINY).data)
    rows = np.arange(0, 96, 12)
    labels = torch.from_numpy(images.column("train", "label"))
    everything = read_images(method.clip, images.splits["train"], method.reads(method.own))
    return Split(everything[rows], labels[rows])


@every_method
@pytest.mark.parametrize("participation", ["first", "later"])
def test_13_one_batch_can_be_overfitted(method: str, participation: str) -> None:
    options = {"local_epochs": 50, "lr": 0.01, "batch_size": 8, **overfitting(method)}
    made = make_method(method, **options)
    data = few_images(made)
    assert data.labels.bincount().tolist() == [2, 2, 2, 2]
    server, head = made.start(), made.build()
    if participation == "later":
        sent = made.send(server, [0, 1], train=True)
        uploads = {}
        for i, received in sent.items():
            fresh = made.build()
            fresh.load(received)
            work = make_work(made, fresh, data, received, client_id=i)
            uploads[i] = Upload(made.upload(work), len(data))
        made.merge(server, uploads)
    received = made.send(server, [0], train=True)[0]
    head.load(received)
    work = make_work(made, head, data, received)
    if not list(head.parameters()):
        assert local.train(made, [work]) == {0: None}
        return
    before = made.loss(head, data.features, data.labels, received).item()
    assert local.accuracies(head, {"all": data})["all"] < 1
    # Most know the batch by heart long before the last epoch
    for _ in range(4):
        after = local.train(made, [work])[0]
        assert after is not None
        right = local.accuracies(head, {"all": data})["all"]
        learned = right == 1 and after < before / 4
        if learned:
            break
    assert learned, (right, after, before)
