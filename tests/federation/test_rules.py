"""Flower's server rules on what a method averages, against the papers' formulas in NumPy."""

from typing import Any

import numpy as np
import pytest
import torch

from pfedmoap_flwr import api
from pfedmoap_flwr.config import ServerSettings
from pfedmoap_flwr.engines.in_process import identify
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.federation.rules import FLOWERS, FlowerRule, replace_mean
from pfedmoap_flwr.methods.base import ServerState, Upload
from pfedmoap_flwr.methods.parts.mean import average
from support.federation import Federate, assert_same, make_method, tensor_files


@pytest.fixture(autouse=True)
def _messages() -> None:
    identify()


SIZES = {0: 3, 1: 1, 2: 4, 3: 2, 4: 5, 5: 1}


def uploads(seed: int) -> dict[int, Upload]:
    generator = torch.Generator().manual_seed(seed)
    return {i: Upload({"ctx": torch.randn(2, 3, generator=generator)}, n) for i, n in SIZES.items()}


def values(sent: dict[int, Upload]) -> np.ndarray:
    return np.stack([u.tensors["ctx"].double().numpy() for u in sent.values()])


def mean(sent: dict[int, Upload]) -> np.ndarray:
    return np.average(values(sent), axis=0, weights=list(SIZES.values()))


def combined(rounds: int, rule: str, **settings: Any) -> tuple[list[np.ndarray], ServerState]:
    """What is shared after each of some rounds."""
    state = ServerState({"ctx": torch.zeros(2, 3)})
    combine = FlowerRule(ServerSettings(rule=rule, **settings))  # type: ignore[arg-type]
    found = []
    for number in range(rounds):
        state.shared |= combine(state, uploads(number))
        state.round += 1
        assert state.shared["ctx"].dtype == torch.float32
        found.append(state.shared["ctx"].double().numpy())
    return found, state


def test_fedadam_is_its_formula_over_rounds() -> None:
    found, state = combined(3, "fedadam", lr=0.05)
    x, m, v = np.zeros((2, 3)), np.zeros((2, 3)), np.zeros((2, 3))
    for number, after in enumerate(found):
        delta = mean(uploads(number)) - x
        m = 0.9 * m + 0.1 * delta
        v = 0.99 * v + 0.01 * delta**2
        rate = 0.05 * np.sqrt(1 - 0.99 ** (number + 2)) / (1 - 0.9 ** (number + 2))
        # Reddi et al.'s step, at the rate of Kingma and Ba
        x = x + rate * m / (np.sqrt(v) + 1e-3)
        np.testing.assert_allclose(after, x, atol=1e-5)
    assert state.extra.keys() == {"server.m_t.ctx", "server.v_t.ctx"}


def test_fedavgm_is_its_formula_over_rounds() -> None:
    found, state = combined(3, "fedavgm", lr=0.5, momentum=0.8)
    x, vector = np.zeros((2, 3)), np.zeros((2, 3))
    for number, after in enumerate(found):
        vector = 0.8 * vector + (x - mean(uploads(number)))
        x = x - 0.5 * vector
        np.testing.assert_allclose(after, x, atol=1e-5)
    assert state.extra.keys() == {"server.momentum.ctx"}


def test_the_median_and_the_trimmed_mean_are_coordinate_wise() -> None:
    (median,), _ = combined(1, "fedmedian")
    np.testing.assert_allclose(median, np.median(values(uploads(0)), axis=0), atol=1e-6)
    (trimmed,), _ = combined(1, "fedtrimmedavg", trim=0.2)
    middle = np.sort(values(uploads(0)), axis=0)[1:-1]
    np.testing.assert_allclose(trimmed, middle.mean(axis=0), atol=1e-6)


def test_krum_takes_the_upload_nearest_to_its_neighbours() -> None:
    (chosen,), _ = combined(1, "krum", malicious=1)
    flat = values(uploads(0)).reshape(len(SIZES), -1)
    squared = ((flat[:, None] - flat) ** 2).sum(-1)
    # The distances to the n - f - 2 nearest others
    scores = [np.sort(np.delete(row, i))[: len(SIZES) - 3].sum() for i, row in enumerate(squared)]
    np.testing.assert_allclose(chosen, values(uploads(0))[int(np.argmin(scores))], atol=1e-6)


def test_one_huge_upload_moves_the_mean_and_not_the_median() -> None:
    sent = uploads(0)
    sent[2].tensors["ctx"] += 1e6
    state = ServerState({"ctx": torch.zeros(2, 3)})
    robust = FlowerRule(ServerSettings(rule="fedmedian"))(state, sent)
    assert robust["ctx"].abs().max() < 10
    assert average(sent, state.shared)["ctx"].abs().max() > 1e4


@pytest.mark.slow
@pytest.mark.parametrize("rule", FLOWERS)
@pytest.mark.parametrize("method", ["promptfl", "pfedmoap"])
def test_a_run_repeats_and_resumes_bit_by_bit(rule: str, method: str, federate: Federate) -> None:
    options = {"method": method, "local_epochs": 1, "batch_size": 16, "flat": {"server.rule": rule}}
    whole = federate("whole/run", num_server_rounds=3, **options)
    assert not any(record.failed for record in whole.rounds())
    run = federate("parts/run", num_server_rounds=2, **options)
    api.execute(api.plan({"resume": str(run.path), "num-server-rounds": 3}))
    assert_same(run, whole)
    plain = federate("plain/run", num_server_rounds=3, **{**options, "flat": {}})
    assert tensor_files(plain) != tensor_files(whole)


def test_what_some_clients_alone_were_sent_is_averaged() -> None:
    state = ServerState({"gate": torch.zeros(2), "one": torch.zeros(2), "two": torch.zeros(2)})
    sent = {
        i: Upload({"gate": torch.full((2,), float(i)), name: torch.full((2,), 1.0 + i)}, 1)
        for i, name in enumerate(["one", "two", "one"])
    }
    found = FlowerRule(ServerSettings(rule="fedmedian"))(state, sent)
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        "gate": [1.0, 1.0],
        "one": [2.0, 2.0],
        "two": [2.0, 2.0],
    }


@pytest.mark.parametrize("method", ["coop", "incfl", "zeroshot"])
def test_a_rule_without_a_say_is_refused_before_any_training(
    method: str, federate: Federate
) -> None:
    with pytest.raises(UsageError, match=r"server\.rule='krum' has no say in"):
        replace_mean(make_method(method), ServerSettings(rule="krum"))
    with pytest.raises(UsageError, match=r"server\.rule='krum' has no say in"):
        federate(method=method, flat={"server.rule": "krum"})
