"""FedLALR's local AMSGrad and its server, against the closed form that public tests assert."""

from typing import Any

import pytest
import torch
from torch import Tensor

from pfedmoap_flwr.methods.base import ServerState, Split, Tensors, Upload
from pfedmoap_flwr.methods.parts.amsgrad import AMSGrad
from pfedmoap_flwr.training import local
from support.federation import make_method, make_work
from support.oracle import numbers, oracle

VECTOR = oracle("fedlalr_amsgrad")
WIRE = ("ctx", "m.ctx", "vhat.ctx")


def steps(
    x: Tensor, m: Tensor, vhat: Tensor, gradients: Any, settings: dict[str, float]
) -> AMSGrad:
    """Take one step for each gradient; all tensors are changed in place."""
    groups = [{"name": "ctx", "params": [x]}]
    optimizer = AMSGrad(groups, {"ctx": (m, vhat)}, settings["beta1"], settings["beta2"])
    optimizer.param_groups[0]["lr"] = settings["alpha"]
    for gradient in gradients:
        x.grad = numbers(gradient)
        optimizer.step()
    return optimizer


def test_16_two_clients_two_rounds() -> None:
    settings = VECTOR["settings"]
    method = make_method("fedlalr")
    x0 = numbers(VECTOR["x0"])
    start = {"m.ctx": torch.zeros_like(x0), "vhat.ctx": torch.full_like(x0, 1e-16)}
    state = ServerState({"ctx": x0}, extra=start)
    for round_ in VECTOR["rounds"]:
        uploads = {}
        for i, (gradients, expected) in enumerate(
            zip(VECTOR["gradients"], round_["clients"], strict=True)
        ):
            sent = {name: t.clone() for name, t in (state.shared | state.extra).items()}
            scaled = round_["gradient_factor"] * numbers(gradients)
            x, m, vhat = (sent[name] for name in WIRE)
            optimizer = steps(x, m, vhat, scaled.tolist(), settings)
            found = {
                "x": sent["ctx"],
                "m": sent["m.ctx"],
                "v_hat": sent["vhat.ctx"],
                "v_local": optimizer.v["ctx"],
            }
            for name, tensor in found.items():
                torch.testing.assert_close(tensor, numbers(expected[name]), rtol=1e-6, atol=1e-9)
            sent["ctx"] = sent["ctx"].detach()
            # Numbers of images that would move a weighted mean
            uploads[i] = Upload(sent, num_examples=1 + 9 * i)
        method.merge(state, uploads)
        for name, key in zip(WIRE, ("x", "m", "v_hat"), strict=True):
            expected = numbers(round_["server"][key])
            found_there = (state.shared | state.extra)[name]
            torch.testing.assert_close(found_there, expected, rtol=1e-6, atol=1e-9)


def test_16_the_first_step_and_the_servers_mean() -> None:
    golden = VECTOR["golden_from_test_file"]
    first = golden["first_step"]
    x, m, vhat = numbers([first["x"]]), numbers([0.0]), numbers([0.0])
    optimizer = steps(x, m, vhat, [[first["gradient"]]], first)
    assert m.item() == pytest.approx(first["m"])
    assert optimizer.v["ctx"].item() == pytest.approx(first["v"])
    assert x.item() == pytest.approx(first["x_after"], rel=1e-6)
    method = make_method("fedlalr")
    names = dict(zip(("x", "m", "v_hat"), WIRE, strict=True))
    zero = torch.zeros(1)
    state = ServerState({"ctx": zero}, extra={"m.ctx": zero, "vhat.ctx": zero})
    sent = [entry["sent"] for entry in golden["server_mean"] if "sent" in entry]
    uploads = {
        i: Upload({names[n]: torch.tensor([v]) for n, v in values.items()}, 1 + 7 * i)
        for i, values in enumerate(sent)
    }
    method.merge(state, uploads)
    (result,) = (entry["result"] for entry in golden["server_mean"] if "result" in entry)
    assert {n: (state.shared | state.extra)[names[n]].item() for n in names} == result


def test_a_client_trains_the_prompt_alone_and_uploads_its_moments() -> None:
    method = make_method("fedlalr", local_epochs=1, batch_size=4)
    state = method.start()
    received = method.send(state, [0], train=True)[0]
    head = method.build()
    images = Split(torch.randn(4, 64), torch.arange(4))
    gradients: list[Tensor] = []
    loss_of = method.loss

    def seen(head: Any, features: Tensor, labels: Tensor, received: Tensors) -> Tensor:
        loss = loss_of(head, features, labels, received)
        gradients.extend(g.clone() for g in torch.autograd.grad(loss, head.ctx, retain_graph=True))
        return loss

    method.loss = seen
    work = make_work(method, head, images, received)
    local.train(method, [work])
    (gradient,) = gradients
    uploaded = method.upload(work)
    assert uploaded.keys() == set(WIRE)
    torch.testing.assert_close(uploaded["m.ctx"], 0.1 * gradient)
    torch.testing.assert_close(uploaded["vhat.ctx"], (0.005 * gradient.square()).clamp_min(1e-16))
    # Whatever the gradient, a first step has one size in every coordinate
    moved = (uploaded["ctx"] - received["ctx"]).abs()
    large = gradient.abs() > 1e-5
    torch.testing.assert_close(
        moved[large], torch.full_like(moved[large], 0.002 * 0.1 / 0.005**0.5), rtol=1e-3, atol=1e-6
    )
    assert torch.equal(received["vhat.ctx"], state.extra["vhat.ctx"])
