"""The setting prompt.verbalizer: what a class makes of its names, for every method or refused."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pfedmoap_flwr import config, methods
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.base import Method, Phase, PromptHead, ServerState
from pfedmoap_flwr.runs import checkpoint
from pfedmoap_flwr.training.whole_prompt import check_whole_prompt
from support.federation import Federate, make_method
from support.works import SHAPES, assert_stacked_as_alone, made_works

NAMES = {"red panda": ["red panda", "firefox", "small bear"], "snow_owl": ["white owl"]}

every_prompt = pytest.mark.parametrize(
    "name", [n for n in methods.names() if issubclass(methods.load(n).head, PromptHead)]
)


@pytest.fixture
def file(tmp_path: Path) -> str:
    return written(tmp_path / "names.json", NAMES)


def written(path: Path, names: dict[str, list[str]]) -> str:
    path.write_text(json.dumps(names))
    return str(path)


def setting(verbalizer: str, file: str) -> dict[str, Any]:
    return {"prompt.verbalizer": verbalizer, "prompt.names": file}


def images(method: Method[Any, Any]) -> Tensor:
    shape = SHAPES[method.reads(method.own).kind]
    return torch.randn((5, *shape), generator=torch.Generator().manual_seed(1))


def refusal(action: Callable[[], Any]) -> str:
    """The one line with which something is refused; "" if it is not."""
    try:
        action()
    except UsageError as refused:
        return str(refused)
    return ""


def texts(head: PromptHead) -> Tensor:
    """The text features (..., C, d) that a head is read by."""
    encoded = head.encode()
    return encoded[0] if isinstance(encoded, tuple) else encoded


@pytest.mark.parametrize("verbalizer", ["max", "weights"])
def test_it_is_about_several_names(verbalizer: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^setting prompt\.verbalizer=.*give that file too$"):
        config.parse({"prompt.verbalizer": verbalizer})
    one = written(tmp_path / "one.json", {"snow_owl": ["white owl"]})
    with pytest.raises(UsageError, match=r"no class of prompt\.names has several names$"):
        make_method("promptfl", **setting(verbalizer, one)).build()


def test_the_largest_logit_of_a_classs_names(file: str) -> None:
    method = make_method("promptfl", **setting("max", file))
    head, x = method.build(), images(method)
    every = (*NAMES["red panda"], "blue whale", "green tree frog", "white owl")
    each = [method.clip.encoder(((own,),), head.template, False)(head.ctx)[0] for own in every]
    logits = head.logit_scale * F.normalize(x, dim=-1) @ torch.stack(each).t()
    expected = torch.cat([logits[:, :3].max(1, keepdim=True).values, logits[:, 3:]], dim=1)
    torch.testing.assert_close(head(x), expected, rtol=1e-5, atol=1e-5)
    assert len({int(row.argmax()) for row in logits[:, :3]}) > 1
    assert_stacked_as_alone(method, rtol=1e-4, atol=1e-6)


@every_prompt
def test_the_best_of_a_class_named_twice_is_the_class_or_it_is_refused(
    name: str, tmp_path: Path
) -> None:
    twice = written(tmp_path / "twice.json", {"red panda": ["red panda", "red panda"]})
    plain, method = make_method(name), make_method(name, **setting("max", twice))
    if said := refusal(method.build):
        assert re.fullmatch(r"setting prompt\.verbalizer='max': \w+ has no logit.*weights", said)
        return
    works = made_works(method)
    for one, other in zip(works, made_works(plain), strict=True):
        losses = [
            made.loss(work.head, work.images.features, work.images.labels, work.received)
            for made, work in ((method, one), (plain, other))
        ]
        torch.testing.assert_close(*losses)
        logits = [w.head.eval()(w.images.features) for w in (one, other)]
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


@every_prompt
@pytest.mark.parametrize("class_specific", [False, True])
def test_weights_start_as_the_mean(name: str, class_specific: bool, file: str) -> None:
    both = {"prompt.names": file, "prompt.class-specific": class_specific}
    mean, weights = (
        texts(make_method(name, **both, **{"prompt.verbalizer": verbalizer}).build())
        for verbalizer in ("mean", "weights")
    )
    torch.testing.assert_close(weights, mean, rtol=0, atol=1e-6)


@every_prompt
def test_weights_are_learned_by_every_method_or_refused(name: str, file: str) -> None:
    method = make_method(name, **setting("weights", file))
    if said := refusal(lambda: check_whole_prompt(method)):
        assert re.fullmatch(r"setting prompt\.verbalizer='weights': \w+ works with ctx.*", said)
        return
    head = method.build()
    head.load({"name_weights": torch.tensor([0.0, 3.0, -2.0, 5.0, 0.0, 0.0])})
    pairs = zip(texts(method.build()).unbind(-2), texts(head).unbind(-2), strict=True)
    # A class of one name is as it was, whatever its weight
    assert [torch.allclose(a, b, atol=1e-6) for a, b in pairs] == [False, True, True, True]


def test_promptfl_averages_weights_and_coop_keeps_them(file: str, federate: Federate) -> None:
    run = federate("promptfl", method="promptfl", flat=setting("weights", file))
    shared = checkpoint.load(run.path).shared
    assert shared.keys() == {"ctx", "name_weights"}
    assert shared["name_weights"].shape == (6,)
    # Of a class with one name nothing is to be learned
    assert [bool(w) for w in shared["name_weights"]] == [True] * 3 + [False] * 3
    run = federate("coop", method="coop", flat=setting("weights", file))
    assert not checkpoint.load(run.path).shared


def test_14_weights_can_be_stacked(file: str) -> None:
    method = make_method("promptfl", **setting("weights", file))
    assert_stacked_as_alone(method, rtol=1e-4, atol=1e-6)


def test_a_run_that_would_not_learn_them_ends_before_it_begins(
    file: str, federate: Federate
) -> None:
    with pytest.raises(UsageError, match=r"FedJETs works with ctx alone .its head has no ctx"):
        federate(method="fedjets", flat=setting("weights", file))


# Each way in which a part of the prompt can be lost


def forgets_to_train(method: Method[Any, Any]) -> None:
    def schedule(head: PromptHead, epochs: int) -> list[Phase]:
        return [(epochs, ("ctx",))]

    method.schedule = schedule  # type: ignore[method-assign]


def forgets_to_upload(method: Method[Any, Any]) -> None:
    method.upload = lambda work: {"ctx": work.head.ctx}  # type: ignore[method-assign]
    method.expected = lambda state, sent: {"ctx": sent["ctx"]}  # type: ignore[method-assign]


def forgets_to_send(method: Method[Any, Any]) -> None:
    def send(state: ServerState, client_ids: Sequence[int], *, train: bool) -> Any:
        names = state.shared if train or not state.round else ("ctx",)
        return {i: {name: state.shared[name] for name in names} for i in client_ids}

    method.send = send  # type: ignore[method-assign]


def forgets_to_merge(method: Method[Any, Any]) -> None:
    def merge(state: ServerState, uploads: Any) -> None:
        state.shared["ctx"] = uploads[0].tensors["ctx"]

    method.merge = merge  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("forgets", "said"),
    [
        (forgets_to_train, "it does not train name_weights"),
        (forgets_to_upload, "it does not upload name_weights"),
        (forgets_to_send, "it does not send name_weights again"),
        (forgets_to_merge, "the server leaves name_weights as it was"),
    ],
)
def test_what_loses_a_part_of_the_prompt_is_refused(forgets: Any, said: str, file: str) -> None:
    method = make_method("promptfl", **setting("weights", file))
    check_whole_prompt(method)
    forgets(method)
    with pytest.raises(UsageError, match=f"works with ctx alone .{said}.$"):
        check_whole_prompt(method)
