"""The settings of `optimizer`: FedLALR's AMSGrad, momentum and weight decay for other methods."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pfedmoap_flwr import api, config, methods
from pfedmoap_flwr.clip.features import Reading
from pfedmoap_flwr.config import ServerSettings
from pfedmoap_flwr.engines.in_process import identify
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.federation.rules import replace_mean
from pfedmoap_flwr.methods.base import Split, Upload
from pfedmoap_flwr.runs import checkpoint
from pfedmoap_flwr.training import local
from pfedmoap_flwr.training.node import node_of
from support.federation import (
    Exchange,
    Federate,
    assert_same,
    kept_head,
    make_method,
    make_work,
    rounds,
)
from support.tiny import TINY
from support.works import assert_stacked_as_alone

AMSGRAD = {"optimizer.name": "amsgrad"}
OWN = ("dispfl", "fedclip", "fedmp", "fedspa")
TRAINLESS = ("gh_ofl", "tofa", "zeroshot")


def images(count: int) -> Split:
    return Split(torch.randn(count, 64), torch.arange(count) % 4)


def gradients_of(method: Any, name: str = "ctx") -> list[np.ndarray]:
    """The gradients of a parameter in every step from now on, in float64."""
    seen: list[np.ndarray] = []
    loss_of = method.loss

    def noted(head: Any, features: Tensor, labels: Tensor, received: Any) -> Tensor:
        loss = loss_of(head, features, labels, received)
        parameter = dict(head.named_parameters())[name]
        (gradient,) = torch.autograd.grad(loss, parameter, retain_graph=True)
        seen.append(gradient.double().numpy())
        return loss

    method.loss = noted
    return seen


def test_by_default_a_method_is_what_its_file_says() -> None:
    for name in methods.names():
        assert type(make_method(name)) is methods.load(name)


def test_promptfl_steps_and_averages_as_the_formulas_in_float64() -> None:
    beta1, beta2, eps, lr = 0.8, 0.9, 1e-3, 0.01
    own = {"optimizer.beta1": beta1, "optimizer.beta2": beta2, "optimizer.eps": eps, "lr": lr}
    method = make_method("promptfl", local_epochs=1, batch_size=4, **AMSGRAD, **own)
    seen = gradients_of(method)
    state = method.start()
    x = state.shared["ctx"].double().numpy()
    m, vhat = np.zeros_like(x), np.full_like(x, eps**2)
    weights = {0: 8, 1: 24}
    for _ in range(2):
        sent = method.send(state, [0, 1], train=True)
        ends, uploads = [], {}
        for i, n_i in weights.items():
            head = method.build()
            head.load(sent[i])
            work = make_work(method, head, images(8), sent[i], client_id=i)
            seen.clear()
            local.train(method, [work])
            assert len(seen) == 2
            mine, x_i, m_i, vhat_i = vhat, x, m, vhat
            for g in seen:
                m_i = beta1 * m_i + (1 - beta1) * g
                mine = beta2 * mine + (1 - beta2) * g**2
                vhat_i = np.maximum(vhat_i, mine)
                x_i = x_i - lr * m_i / np.sqrt(vhat_i)
            ends.append((x_i, m_i, vhat_i))
            uploads[i] = Upload(method.upload(work), n_i)
            assert uploads[i].tensors.keys() == method.expected(state, sent[i]).keys()
        method.merge(state, uploads)
        x, m, vhat = (0.25 * one + 0.75 * other for one, other in zip(*ends, strict=True))
        assert state.shared.keys() == {"ctx"}
        found = state.shared | state.extra
        for name, expected in (("ctx", x), ("m.ctx", m), ("vhat.ctx", vhat)):
            np.testing.assert_allclose(found[name].numpy(), expected, rtol=2e-4, atol=1e-7)
    assert np.abs(x - state.shared["ctx"].numpy()).max() < 1e-6 < np.abs(m).max()


def test_with_clients_of_equal_size_promptfl_is_fedlalr(federate: Federate) -> None:
    flat = {"data.partition": "iid"}
    runs = [
        federate("lalr/run", method="fedlalr", flat=flat),
        federate("promptfl/run", method="promptfl", flat={**flat, **AMSGRAD}),
    ]
    assert len({row["train"] for row in runs[0].clients()}) == 1
    assert rounds(runs[0]) == rounds(runs[1])
    one, other = (checkpoint.load(run.path) for run in runs)
    torch.testing.assert_close(other.shared, one.shared, rtol=0, atol=0)
    torch.testing.assert_close(other.extra, one.extra, rtol=0, atol=0)
    assert kept_head(runs[0], 0).keys() == {"ctx", "m.ctx", "vhat.ctx"}


def test_moments_of_what_is_personal_stay_and_a_run_resumes(
    federate: Federate, wire: list[Exchange]
) -> None:
    options = {"method": "pfedmoap", "local_epochs": 1, "batch_size": 16, "flat": AMSGRAD}
    whole = federate("whole/run", num_server_rounds=3, **options)
    assert not any(record.failed for record in whole.rounds())
    first, *_ = (exchange for exchange in wire if exchange.kind == "train")
    assert first.down.keys() == first.up.keys() == {"ctx", "m.ctx", "vhat.ctx"}
    assert not any(name.startswith(("m.gate", "gate")) for e in wire for name in {*e.down, *e.up})
    # The gate has no gradient before a client borrows experts
    moments = [kept_head(whole, 0, after=n)["m.gate.query.weight"] for n in (2, 3)]
    assert moments[0].abs().max() > 0
    assert not torch.equal(*moments)
    run = federate("parts/run", num_server_rounds=2, **options)
    api.execute(api.plan({"resume": str(run.path), "num-server-rounds": 3}))
    assert_same(run, whole)


def test_only_moments_of_the_experts_that_came_go_up() -> None:
    method = make_method("fedjets", **AMSGRAD)
    state = method.start()
    sent = method.send(state, [0], train=True)[0]
    experts = {name for name in sent if name.startswith("experts.")}
    assert len(experts) == method.own.top
    moments = {f"{kind}.{name}" for name in {*experts, "gate"} for kind in ("m", "vhat")}
    assert sent.keys() == {"gate", "which", *experts, *moments}
    head = method.build()
    head.load(sent)
    uploaded = method.upload(make_work(method, head, images(4), sent))
    assert uploaded.keys() == method.expected(state, sent).keys()
    assert uploaded.keys() == {"gate", "ranks", *experts, *moments}


@pytest.mark.parametrize("name", ["fedlalr", "fedrep", "promptfl"])
def test_stacked_they_train_as_alone(name: str) -> None:
    method = make_method(name, lr=0.001, local_epochs=1, **AMSGRAD)
    assert_stacked_as_alone(method, rtol=1e-3, atol=1e-4)


def test_what_a_method_does_at_every_step_goes_on() -> None:
    method = make_method("dp_fpl", local_epochs=2, batch_size=4, **AMSGRAD)
    head = method.build()
    work = make_work(method, head, images(8), method.send(method.start(), [0], train=True)[0])
    local.train(method, [work])
    assert int(head.steps) == 4  # counted where noise is added
    assert head.m.local.abs().max() > 0


def test_a_rule_of_the_server_has_no_say_in_moments() -> None:
    identify()
    method = make_method("promptfl", **AMSGRAD)
    replace_mean(method, ServerSettings(rule="fedmedian"))
    state = method.start()
    like = method.expected(state, method.send(state, [0], train=True)[0])
    uploads = {
        i: Upload({name: torch.full_like(t, value) for name, t in like.items()}, 1)
        for i, value in enumerate((1.0, 2.0, 9.0))
    }
    method.merge(state, uploads)
    assert state.shared["ctx"].unique().tolist() == [2.0]
    assert state.extra["m.ctx"].unique().tolist() == [4.0]
    assert state.extra["vhat.ctx"].unique().tolist() == [4.0]


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (OWN + TRAINLESS, "has an optimizer of its own, or trains nothing"),
        (("coop", "incfl"), "does not average what clients upload"),
        (("fedmgp",), "do not train what they upload"),
    ],
)
def test_others_are_refused(names: tuple[str, ...], why: str) -> None:
    for name in names:
        with pytest.raises(UsageError, match=rf"optimizer\.name='amsgrad' cannot .*{why}"):
            make_method(name, **AMSGRAD)


def test_a_run_that_is_refused_trains_nobody(federate: Federate, wire: list[Exchange]) -> None:
    with pytest.raises(UsageError, match=r"optimizer\.name='amsgrad' cannot be used with CoOp"):
        federate(method="coop", flat=AMSGRAD)
    assert not wire


def test_moments_of_another_shape_are_refused() -> None:
    method = make_method("promptfl", **AMSGRAD)
    head = method.build()
    head.load({"vhat.ctx": torch.ones(7, *head.ctx.shape)})
    with pytest.raises(ValueError, match=r"vhat\.ctx has shape \(7, 4, 32\), not \(4, 32\)"):
        local.train(method, [make_work(method, head, images(4))])


# Momentum and weight decay


def test_momentum_and_decay_are_their_formula_in_float64() -> None:
    said = {"optimizer.momentum": 0.5, "optimizer.weight-decay": 0.1}
    method = make_method("promptfl", local_epochs=1, batch_size=4, lr=0.05, **said)
    seen = gradients_of(method)
    head = method.build()
    x = head.ctx.detach().double().numpy()
    local.train(method, [make_work(method, head, images(12))])
    speed = 0.0
    for g in seen:
        speed = 0.5 * speed + g + 0.1 * x
        x = x - 0.05 * speed
    assert len(seen) == 3
    np.testing.assert_allclose(head.ctx.detach().numpy(), x, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "said", "expected"),
    [
        ("promptfl", {}, (0.9, 5e-4)),
        ("promptfl", {"optimizer.momentum": 0.0}, (0.0, 5e-4)),
        ("fedrep", {"optimizer.weight-decay": 0.0}, (0.5, 0.0)),
    ],
)
def test_what_is_said_goes_over_what_a_released_code_has(
    name: str, said: dict[str, Any], expected: tuple[float, float]
) -> None:
    method = make_method(name, compat="released", **said)
    head = method.build()
    groups = [{"name": "ctx", "params": [head.ctx]}]
    found = method.optimizer(make_work(method, head), groups).defaults
    assert (found["momentum"], found["weight_decay"]) == expected


def test_momentum_has_no_say_in_other_optimizers() -> None:
    for name in (*OWN, *TRAINLESS, "fedlalr"):
        with pytest.raises(UsageError, match=r"optimizer\.momentum=0\.5 has no say in"):
            make_method(name, **{"optimizer.momentum": 0.5})
    with pytest.raises(UsageError, match=r"optimizer\.weight-decay=0\.1 has no say in PromptFL"):
        make_method("promptfl", **AMSGRAD, **{"optimizer.weight-decay": 0.1})


# Rates from round to round


@pytest.mark.parametrize("kind", ["constant", "cosine", "step"])
def test_rates_are_those_of_pytorchs_schedulers(kind: str) -> None:
    rounds, said = 7, make_method("promptfl", **{"optimizer.lr-step": 3}).settings.optimizer
    said = said.model_copy(update={"lr_schedule": kind, "lr_gamma": 0.5})
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs: Any = {
        "constant": lambda: torch.optim.lr_scheduler.ConstantLR(sgd, factor=1.0),
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=rounds),
        "step": lambda: torch.optim.lr_scheduler.StepLR(sgd, step_size=3, gamma=0.5),
    }[kind]()
    for number in range(1, rounds + 1):
        assert said.rate(number, rounds) == pytest.approx(theirs.get_last_lr()[0])
        sgd.step()
        theirs.step()


def test_a_round_trains_at_its_own_rate(federate: Federate) -> None:
    """With gamma 0.5 after one round, round 2 is that of a run at half the rate."""
    flat = {"optimizer.lr-schedule": "step", "optimizer.lr-step": 1, "optimizer.lr-gamma": 0.5}
    falling = federate("falling", method="coop", flat={**flat, "clients-at-once": 2})
    first = federate("first", method="coop", num_server_rounds=1)
    method = make_method("coop")
    kept = kept_head(falling, 0, after=1)
    assert torch.equal(kept["ctx"], kept_head(first, 0)["ctx"])
    head = make_method("coop", lr=0.001).build()
    head.load(kept)
    data = federated_split(0)
    half = make_method("coop", lr=0.001)
    work = make_work(half, head, data, server_round=2)
    local.train(half, [work])
    torch.testing.assert_close(head.ctx, kept_head(falling, 0)["ctx"])
    other = method.build()
    other.load(kept)
    local.train(method, [make_work(method, other, data, server_round=2)])
    assert not torch.allclose(other.ctx, kept_head(falling, 0)["ctx"], atol=1e-6)


def federated_split(client_id: int) -> Split:
    """The training images of a client of the tiny federation."""
    settings = config.parse(TINY)
    node = node_of(settings.clip, settings.data, settings.seed, "cpu", Reading())
    return node.split(client_id, "train")


def test_rates_that_fall_over_all_rounds_belong_to_so_many_rounds(federate: Federate) -> None:
    run = federate(method="coop", flat={"optimizer.lr-schedule": "cosine"})
    with pytest.raises(UsageError, match="fall over all of the run's 2 rounds"):
        api.plan({"resume": str(run.path), "num-server-rounds": 3})
