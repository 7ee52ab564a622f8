"""Privacy of what is uploaded: clipping, noise, what was spent, and who is refused."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pfedmoap_flwr import config
from pfedmoap_flwr.errors import RunFailed, UsageError
from pfedmoap_flwr.federation.privacy import SUMS, Ledger, check_privacy, in_place_of_each
from pfedmoap_flwr.methods.base import Upload
from pfedmoap_flwr.methods.parts.privacy import delta_of, epsilon_after, secret_normal, sums_within
from pfedmoap_flwr.runs import checkpoint
from pfedmoap_flwr.training import local
from support.federation import Exchange, Federate, assert_same, kept_head, make_method
from support.tiny import NUM_CLIENTS, TINY

SHORT = {"local_epochs": 1, "num_server_rounds": 1}
CLIENT = {"privacy.unit": "client", "privacy.clip-norm": 0.001}
SERVER = {**CLIENT, "privacy.where": "server"}


def flat(**privacy: Any) -> dict[str, Any]:
    return {f"privacy.{key.replace('_', '-')}": value for key, value in privacy.items()}


def updates(wire: list[Exchange], server_round: int = 1) -> dict[int, np.ndarray]:
    """What each client's upload adds to what it received, all tensors in one vector, float64."""
    found = {}
    for e in wire:
        if e.kind == "train" and e.round == server_round:
            parts = [(e.up[n].double() - e.down[n].double()).flatten() for n in sorted(e.up)]
            found[e.client] = torch.cat(parts).numpy()
    wire.clear()
    return found


# What goes up


@pytest.mark.parametrize("where", ["client", "server"])
@pytest.mark.parametrize(
    ("method", "more"), [("promptfl", {}), ("pfedmoap", {"pfedmoap.gate-shared": True})]
)
def test_an_update_is_clipped_whole(
    method: str, more: dict[str, Any], where: str, federate: Federate, wire: list[Exchange]
) -> None:
    if where == "server" and method == "pfedmoap":
        pytest.skip("its pool needs each prompt")
    federate("plain", method=method, **SHORT, flat=more)
    plain = updates(wire)
    largest = 0.5 * min(float(np.linalg.norm(u)) for u in plain.values())
    options = flat(unit="client", where=where, noise=0.0, clip_norm=largest)
    federate("clipped", method=method, **SHORT, flat={**options, **more})
    for client, update in updates(wire).items():
        expected = plain[client] * largest / np.linalg.norm(plain[client])
        # float32 prompts hold a step of this size to a few digits
        np.testing.assert_allclose(update, expected, atol=1e-7)
    federate("long", method=method, **SHORT, flat={**options, **more, **flat(clip_norm=1e9)})
    for client, update in updates(wire).items():
        np.testing.assert_allclose(update, plain[client], atol=1e-7)


@pytest.mark.parametrize("method", ["promptfl", "pfedmoap"])
def test_noise_at_the_client_counts_in_clip_norms(
    method: str, federate: Federate, wire: list[Exchange]
) -> None:
    options = flat(unit="client", clip_norm=0.2)
    federate("clipped", method=method, **SHORT, flat={**options, **flat(noise=0.0)})
    without = updates(wire)
    run = federate("noised", method=method, **SHORT, flat={**options, **flat(noise=3.0)})
    noised = updates(wire)
    noise = {client: noised[client] - without[client] for client in without}
    for drawn in noise.values():
        assert drawn.size == 128
        assert drawn.std() == pytest.approx(3.0 * 0.2, rel=0.2)
    assert abs(np.corrcoef(list(noise.values())) - np.eye(NUM_CLIENTS)).max() < 0.4
    for client in noise:
        # The client goes on with its own prompt; the pool has the noised one
        own = kept_head(run, client)["ctx"].numpy()
        pool = checkpoint.load(run.path).pool
        if method == "pfedmoap":
            lent = pool[client]["ctx"].numpy()
            np.testing.assert_allclose(lent - own, noise[client].reshape(own.shape), atol=0.25)
            assert not np.array_equal(lent, own)


def test_noise_at_the_server_is_added_once_to_the_mean_of_all_who_were_asked() -> None:
    settings = config.parse({**TINY, **flat(unit="client", where="server", clip_norm=2.0)})
    rng = np.random.default_rng(0)
    base = rng.normal(size=(50, 40))
    steps = {i: rng.normal(size=(50, 40)) * (0.01 if i == 1 else 1) for i in (3, 1)}
    sent = {i: {"ctx": torch.tensor(base)} for i in range(5)}
    uploads = {i: Upload({"ctx": torch.tensor(base + s)}, i) for i, s in steps.items()}
    quiet = settings.replace(flat(noise=0.0))
    found = in_place_of_each(quiet, sent, uploads, 1)
    clipped = [s * min(1.0, 2.0 / float(np.linalg.norm(s))) for s in steps.values()]
    assert np.linalg.norm(clipped[0]) == pytest.approx(2)
    assert np.linalg.norm(clipped[1]) < 2
    expected = base + sum(clipped) / 5
    assert {i: u.num_examples for i, u in found.items()} == {3: 3, 1: 1}
    for upload in found.values():
        np.testing.assert_allclose(upload.tensors["ctx"].numpy(), expected, atol=1e-12)
    loud = in_place_of_each(settings.replace(flat(noise=4.0)), sent, uploads, 1)
    noise = loud[3].tensors["ctx"].numpy() - expected
    assert noise.std() == pytest.approx(4.0 * 2.0 / 5, rel=0.1)
    assert torch.equal(loud[1].tensors["ctx"], loud[3].tensors["ctx"])
    later = in_place_of_each(settings.replace(flat(noise=4.0)), sent, uploads, 2)
    assert not torch.equal(later[1].tensors["ctx"], loud[1].tensors["ctx"])


def test_at_the_server_everybody_weighs_the_same(federate: Federate, wire: list[Exchange]) -> None:
    run = federate(method="promptfl", **SHORT, flat={**SERVER, "privacy.noise": 0.0})
    down = next(e.down["ctx"] for e in wire if e.kind == "train").double()
    step = np.mean(list(updates(wire).values()), axis=0)
    assert len({row["train"] for row in run.clients()}) > 1
    shared = checkpoint.load(run.path).shared["ctx"].double()
    np.testing.assert_allclose((shared - down).flatten().numpy(), step, atol=1e-7)


def test_neither_the_loss_nor_other_numbers_go_up(federate: Federate, wire: list[Exchange]) -> None:
    run = federate(method="dp_fpl", **SHORT, flat=CLIENT)
    trained = [e for e in wire if e.kind == "train"]
    for exchange in trained:
        assert set(exchange.reply.content["metrics"]) == {"client", "num-examples"}
    assert run.rounds()[1].train_loss is None
    assert run.rounds()[1].client_metrics == {}


# Where noise comes from


def test_with_the_seed_a_repeat_is_equal_and_with_secret_noise_it_is_not(
    federate: Federate, wire: list[Exchange]
) -> None:
    options = {"method": "promptfl", **SHORT}
    assert_same(
        federate("one/run", flat=CLIENT, **options), federate("two/run", flat=CLIENT, **options)
    )
    wire.clear()
    secret = {**CLIENT, **flat(secret_noise=True, noise=5.0)}
    federate("three/run", flat=secret, **options)
    first = updates(wire)
    federate("four/run", flat=secret, **options)
    second = updates(wire)
    for client in first:
        assert (first[client] != second[client]).all()
        assert first[client].std() == pytest.approx(0.005, rel=0.3)


def test_secret_noise_is_normal_and_never_the_same() -> None:
    drawn = secret_normal(torch.Size([200_000]))
    assert drawn.dtype == torch.float64
    for x, share in ((-3.0, 0.00134990), (-1.0, 0.15865525), (0.0, 0.5), (2.0, 0.97724987)):
        assert (drawn <= x).double().mean().item() == pytest.approx(share, abs=0.005)
    assert drawn.unique().numel() == drawn.numel()
    assert secret_normal(torch.Size([])).shape == ()
    assert secret_normal(torch.Size([0, 3])).shape == (0, 3)


def test_a_generator_of_pytorch_would_not_be_secret() -> None:
    # Why secret noise is not drawn by one: 2^32 seeds can be tried
    one, other = (torch.Generator().manual_seed(seed) for seed in (5, 5 + 2**32))
    assert torch.equal(torch.randn(64, generator=one), torch.randn(64, generator=other))


# What was spent


def hockey_stick(mu: float, epsilon: float) -> float:
    """max(0, p - e^epsilon q) over the densities of N(mu, 1) and N(0, 1), integrated."""
    x = np.linspace(-40, 60, 2_000_001)
    p, q = (np.exp(-((x - m) ** 2) / 2) / math.sqrt(2 * math.pi) for m in (mu, 0.0))
    return float(np.trapezoid(np.maximum(p - math.exp(epsilon) * q, 0), x))


@pytest.mark.parametrize(
    ("rounds", "noise", "delta"),
    [(1, 1.0, 1e-5), (10, 2.0, 1e-5), (100, 8.0, 1e-6), (10, 1.0, 0.05)],
)
def test_epsilon_over_rounds_is_that_of_the_integral(
    rounds: int, noise: float, delta: float
) -> None:
    epsilon = epsilon_after(rounds, noise, delta)
    mu = math.sqrt(rounds) / noise
    assert hockey_stick(mu, epsilon) == pytest.approx(delta, rel=1e-4)


def test_epsilon_is_what_has_been_published() -> None:
    # Dong, Roth, Su, Corollary 2.13 at mu = 1: 2 Phi(1/2) - 1 and Phi(-1/2) - e Phi(-3/2)
    assert delta_of(1.0, 0.0) == pytest.approx(0.38292492254802624, rel=1e-9)
    assert delta_of(1.0, 1.0) == pytest.approx(0.12693673750664397, rel=1e-6)
    # Balle and Wang: the sigma of their analytic mechanism for epsilon 1 and delta 1e-5
    assert epsilon_after(1, 3.730631634816464, 1e-5) == pytest.approx(1.0, rel=1e-6)
    assert epsilon_after(0, 1.0, 1e-5) == 0
    assert epsilon_after(1, 0.0, 1e-5) == math.inf


def test_how_many_rounds_fit_is_the_last_one_within() -> None:
    fits = sums_within(4.0, 3.0, 1e-5)
    assert epsilon_after(fits, 3.0, 1e-5) <= 4.0 < epsilon_after(fits + 1, 3.0, 1e-5)
    assert sums_within(4.0, 0.0, 1e-5) == 0


def test_epsilon_stands_in_each_round_the_summary_and_the_log(
    federate: Federate, caplog: pytest.LogCaptureFixture
) -> None:
    options = flat(noise=2.0, delta=1e-4)
    run = federate(method="promptfl", local_epochs=1, flat={**CLIENT, **options})
    expected = [epsilon_after(k, 2.0, 1e-4) for k in (1, 2)]
    assert [r.metrics["epsilon"] for r in run.rounds()[1:]] == pytest.approx(expected)
    assert run.summary()["epsilon"] == pytest.approx(expected[1])
    assert f"epsilon {expected[1]:.3g}" in run.rounds()[2].line(2)
    assert "privacy.secret-noise=true" in caplog.text


def test_other_data_in_the_place_of_some_costs_twice_the_distance(federate: Federate) -> None:
    options = flat(noise=6.0, neighbours="replaced")
    run = federate(method="promptfl", **SHORT, flat={**CLIENT, **options})
    assert run.summary()["epsilon"] == pytest.approx(epsilon_after(1, 3.0, 1e-5))


def test_without_noise_nothing_is_said(federate: Federate) -> None:
    run = federate(method="promptfl", **SHORT, flat={**CLIENT, "privacy.noise": 0.0})
    assert run.rounds()[1].metrics == {}
    assert "epsilon" not in run.summary()


def test_who_was_drawn_most_often_counts(federate: Federate) -> None:
    options = {"fraction_train": 0.5, "num_server_rounds": 3, "local_epochs": 1}
    run = federate(method="promptfl", flat={**CLIENT, **flat(noise=2.0)}, **options)
    asked = [sum(i in r.bytes_down for r in run.rounds()) for i in range(NUM_CLIENTS)]
    assert checkpoint.load(run.path).extra[SUMS].tolist() == asked
    assert run.summary()["epsilon"] == pytest.approx(epsilon_after(max(asked), 2.0, 1e-5))


def test_a_run_beyond_its_budget_does_not_start(federate: Federate, wire: list[Exchange]) -> None:
    budget = (epsilon_after(3, 2.0, 1e-5) + epsilon_after(4, 2.0, 1e-5)) / 2
    options = {**CLIENT, **flat(noise=2.0, budget=budget)}
    with pytest.raises(UsageError, match=r"round 4 of 5 would spend .*; 3 rounds fit"):
        federate("long", method="promptfl", num_server_rounds=5, flat=options)
    assert wire == []
    run = federate("short", method="promptfl", num_server_rounds=3, local_epochs=1, flat=options)
    assert run.summary()["epsilon"] <= budget
    resume = {"resume": str(run.path), **options}
    with pytest.raises(UsageError, match=r"round 4 of 4 would spend .*; 3 rounds fit"):
        federate("short", method="promptfl", num_server_rounds=4, local_epochs=1, flat=resume)
    assert len(run.rounds()) == 4
    assert run.summary()["epsilon"] <= budget


def test_a_resumed_run_counts_the_rounds_that_were_done(federate: Federate) -> None:
    options = {"method": "promptfl", "local_epochs": 1}
    noise = {**CLIENT, **flat(noise=2.0)}
    whole = federate("whole/run", num_server_rounds=3, flat=noise, **options)
    part = federate("part/run", num_server_rounds=2, flat=noise, **options)
    resumed = {**noise, "resume": str(part.path)}
    assert_same(whole, federate("part/run", num_server_rounds=3, flat=resumed, **options))


def test_an_attempt_that_failed_was_spent_too(
    federate: Federate,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("boom")

    monkeypatch.setattr(local, "train", broken)
    attempts = {"server.attempts": 6, **flat(noise=2.0)}
    with pytest.raises(RunFailed):
        federate(method="promptfl", fraction_train=0.25, flat={**CLIENT, **attempts})
    tried = 1 + caplog.text.count("round 1 is tried again")
    assert tried > 1
    assert checkpoint.load(tmp_path / "run").extra[SUMS].sum() == tried


def test_who_has_spent_the_budget_is_not_asked_again() -> None:
    budget = epsilon_after(2, 2.0, 1e-5) + 1e-6
    method = make_method("promptfl", **CLIENT, **flat(noise=2.0, budget=budget))
    state = method.start()
    ledger = Ledger(method, state, NUM_CLIENTS)
    assert ledger.ask([0, 1]) == [0, 1]
    assert ledger.ask([1, 2]) == [1, 2]
    assert ledger.epsilon() == pytest.approx(epsilon_after(2, 2.0, 1e-5))
    # What is in the checkpoint is all that it knows
    assert Ledger(method, state, NUM_CLIENTS).ask([0, 1, 2, 3]) == [0, 2, 3]
    assert state.extra[SUMS].tolist() == [2, 2, 2, 1]


# Who is refused

UNSUITED = {
    "coop": "upload nothing",
    "zeroshot": "upload nothing",
    "dispfl": "uploads mask",
    "fedjets": "uploads ranks",
    "fedlalr": "besides",
    "fedmgp": "which they do not train",
    "gh_ofl": "besides",
    "incfl": "uploads loss, rho",
    "sgpt": "uploads counts",
    "tofa": "besides",
}
SINGLE = ("pfedmoap", "fedamp", "fedabml")


@pytest.mark.parametrize("method", UNSUITED)
def test_what_is_no_update_is_refused_in_one_line(method: str) -> None:
    made = make_method(method, **CLIENT)
    with pytest.raises(UsageError, match=UNSUITED[method]) as raised:
        check_privacy(made, "average")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("method", SINGLE)
def test_a_server_that_keeps_single_uploads_cannot_add_the_noise(method: str) -> None:
    check_privacy(make_method(method, **CLIENT), "average")
    with pytest.raises(UsageError, match="makes more of uploads than their mean"):
        check_privacy(make_method(method, **SERVER), "average")


@pytest.mark.parametrize("method", ["promptfl", "fedprox", "fedclip", "fedtpg", "fedper"])
def test_a_server_that_takes_the_mean_can(method: str) -> None:
    check_privacy(make_method(method, **SERVER), "fedadam")
    with pytest.raises(UsageError, match=r"server\.rule='krum' wants each upload"):
        check_privacy(make_method(method, **SERVER), "krum")
