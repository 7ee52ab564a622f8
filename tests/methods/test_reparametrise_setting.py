"""The setting prompt.reparametrise: a network writes the context, for every method or refused."""

import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pfedmoap_flwr import methods
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.base import PromptHead
from pfedmoap_flwr.methods.parts.reparametrised import BiLSTM, Kind, PromptWriter
from pfedmoap_flwr.runs import checkpoint
from pfedmoap_flwr.training.whole_prompt import check_whole_prompt
from support.federation import Federate, make_method
from support.works import assert_stacked_as_alone

both = pytest.mark.parametrize("kind", ["mlp", "lstm"])


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


@pytest.mark.parametrize("shape", [(5, 6), (3, 5, 6)])
def test_the_lstm_is_pytorchs_own(shape: tuple[int, ...]) -> None:
    ours = BiLSTM(6, 4, generator()).double()
    theirs = nn.LSTM(6, 4, num_layers=2, bidirectional=True, batch_first=True).double()
    theirs.load_state_dict(ours.state_dict())
    x = drawn(*shape)
    found, expected = ours(x), theirs(x)[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = drawn(*found.shape)
    gradients = [
        torch.autograd.grad((out * weights).sum(), [dict(net.named_parameters())[n] for n in names])
        for names in [list(ours.state_dict())]
        for net, out in ((ours, found), (theirs, expected))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


@both
@pytest.mark.parametrize("shape", [(5, 6), (3, 5, 6)])
def test_the_context_is_the_start_and_what_the_network_writes_otherwise(
    kind: Kind, shape: tuple[int, ...]
) -> None:
    start = drawn(*shape).float()
    writer = PromptWriter(kind, start, generator())
    torch.testing.assert_close(writer(), start)

    def written(writer: PromptWriter) -> Tensor:
        x, named = writer.embeddings.double(), dict(writer.double().named_parameters())
        if kind == "lstm":
            theirs = nn.LSTM(6, 3, num_layers=2, bidirectional=True, batch_first=True).double()
            theirs.load_state_dict({n: named[f"lstm.{n}"] for n in theirs.state_dict()})
            x = theirs(x)[0]
        hidden = (x @ named["mlp.0.weight"].T + named["mlp.0.bias"]).clamp(min=0)
        return hidden @ named["mlp.2.weight"].T + named["mlp.2.bias"]

    before = written(PromptWriter(kind, start, generator()))
    with torch.no_grad():
        for parameter in writer.parameters():
            parameter.add_(drawn(*parameter.shape).float())
    found = writer().double()
    torch.testing.assert_close(found, start + written(writer) - before, rtol=1e-4, atol=1e-4)
    assert (found - start).abs().mean() > 0.1


@both
@pytest.mark.parametrize("class_specific", [False, True])
def test_a_head_starts_from_the_same_prompt(kind: str, class_specific: bool) -> None:
    changes = {"prompt.class-specific": class_specific, "prompt.ctx-init": "a photo of a"}
    plain = make_method("promptfl", **changes).build()
    head = make_method("promptfl", **changes, **{"prompt.reparametrise": kind}).build()
    assert {n for n, _ in head.named_parameters()} == set(head.prompt)
    assert "ctx" not in head.state()
    torch.testing.assert_close(head.ctx, plain.ctx.detach())
    torch.testing.assert_close(head.encode(), plain.encode(), rtol=1e-4, atol=1e-4)
    # What is loaded is read at once
    head.load({"writer.mlp.2.bias": head.state()["writer.mlp.2.bias"] + 1})
    torch.testing.assert_close(head.ctx, plain.ctx.detach() + 1)


@pytest.mark.parametrize(
    "name", [n for n in methods.names() if issubclass(methods.load(n).head, PromptHead)]
)
def test_every_method_learns_all_of_it_or_is_refused(name: str) -> None:
    method = make_method(name, **{"prompt.reparametrise": "mlp"})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as in a run
            check_whole_prompt(method)
        said = ""
    except UsageError as refused:
        said = str(refused)
    line = rf"setting prompt\.reparametrise='mlp': {type(method).__name__} works with ctx alone .*"
    assert not said or re.fullmatch(line, said)
    # No private step is taken for the parameters of a network
    assert said or name not in ("dp_fpl", "fedsept")


@both
def test_14_networks_can_be_stacked(kind: str) -> None:
    method = make_method("promptfl", **{"prompt.reparametrise": kind})
    assert_stacked_as_alone(method, rtol=1e-4, atol=1e-5)


def test_promptfl_averages_the_network_and_coop_keeps_it(federate: Federate) -> None:
    flat: dict[str, Any] = {"prompt.reparametrise": "lstm"}
    run = federate("promptfl", method="promptfl", flat=flat)
    start = make_method("promptfl", **flat).start().shared
    shared = checkpoint.load(run.path).shared
    assert shared.keys() == start.keys()
    assert not [name for name in start if torch.equal(shared[name], start[name])]
    run = federate("coop", method="coop", flat=flat)
    assert not checkpoint.load(run.path).shared
    with pytest.raises(UsageError, match=r"PFedMoAP works with ctx alone"):
        federate("pfedmoap", method="pfedmoap", flat=flat)
