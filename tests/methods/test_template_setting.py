"""The setting prompt.template: what it replaces, and that methods work on it unchanged."""

import re
import shlex
import tomllib
from typing import Any

import pytest
import torch

from pfedmoap_flwr import config, methods
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.base import PromptHead
from pfedmoap_flwr.runs import checkpoint
from pfedmoap_flwr.settings import flatten
from support import ROOT
from support.federation import Federate, make_method, make_work, rounds, tensor_files

DEFAULT = {"prompt.n-ctx": 16}  # the tests' own have less
EMOJI = "{soft:2#a} {class}, {soft:3} drawn as an emoji {soft:2#a}."
# Keys, and the template that they mean
SAME: list[tuple[dict[str, Any], str]] = [
    ({"prompt.n-ctx": 5}, "{soft:5} {class}."),
    ({"prompt.n-ctx": 5, "prompt.class-token-position": "middle"}, "{soft:2} {class} {soft:3}."),
    ({"prompt.n-ctx": 5, "prompt.class-token-position": "front"}, "{class} {soft:5}."),
    ({"prompt.ctx-init": "a photo of a"}, "{soft:a photo of a} {class}."),
    (
        {"prompt.ctx-init": "a photo of a", "prompt.class-token-position": "middle"},
        "{soft:a photo} {class} {soft:of a}.",
    ),
]


@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize(("keys", "template"), SAME, ids=[template for _, template in SAME])
def test_keys_and_their_template_are_the_same_prompt(
    keys: dict[str, Any], template: str, class_specific: bool
) -> None:
    both = {"prompt.class-specific": class_specific}
    heads = [
        make_method("promptfl", **both, **changes).build()
        for changes in (keys, DEFAULT | {"prompt.template": template})
    ]
    assert torch.equal(*(head.ctx for head in heads))
    features = [head.encode() for head in heads]
    assert torch.equal(*features)
    target = torch.randn(features[0].shape)
    gradients = [
        torch.autograd.grad((text * target).sum(), head.ctx)[0]
        for head, text in zip(heads, features, strict=True)
    ]
    assert torch.equal(*gradients)


def test_vectors_start_as_drawn_or_as_words() -> None:
    template = "{soft:2} {soft:red photo#a} {class} {soft:1} {soft:red photo#a}"
    method = make_method("promptfl", **DEFAULT, **{"prompt.template": template})
    head = method.build()
    drawn = make_method("promptfl", **{"prompt.n-ctx": 5}).build().ctx
    assert head.ctx.shape == (5, 32)
    assert torch.equal(head.ctx[[0, 1, 4]], drawn[[0, 1, 4]])
    assert torch.equal(head.ctx[2:4], method.clip.embed("red photo"))


@pytest.mark.parametrize(
    ("key", "value"),
    [("n-ctx", 4), ("ctx-init", "a photo"), ("class-token-position", "front")],
)
def test_a_template_goes_with_none_of_the_keys_that_it_replaces(key: str, value: Any) -> None:
    flat = {"prompt.template": "{soft:4} {class}.", f"prompt.{key}": value}
    with pytest.raises(UsageError, match=rf"^setting prompt\.template=.*prompt\.{key}.*leave") as e:
        config.parse(flat)
    assert "\n" not in str(e.value)
    # The class's own vectors are said by their own key
    config.parse({"prompt.template": "{soft:4} {class}.", "prompt.class-specific": True})


def test_11_a_template_survives_being_written_and_read() -> None:
    settings = config.parse({"prompt.template": '{soft:2#a} {class}, "ä" \\ # = {soft:a b}\t.'})
    assert config.parse(flatten(tomllib.loads(config.toml(settings.flat())))) == settings
    assert settings != config.parse({})


def test_a_wrong_template_ends_before_anything_is_loaded() -> None:
    with pytest.raises(UsageError, match=r"^setting prompt\.template=.*'\{name\}' is no field"):
        config.parse({"prompt.template": "{soft:4} {name}."})


def test_a_template_that_does_not_fit_names_the_class() -> None:
    method = make_method("promptfl", **DEFAULT, **{"prompt.template": "{soft:27} {class}."})
    with pytest.raises(UsageError, match=r"clip\.model=tiny.*\"green tree frog\" in \"\{soft:27\}"):
        method.build()


@pytest.mark.parametrize(
    "name", [n for n in methods.names() if issubclass(methods.load(n).head, PromptHead)]
)
@pytest.mark.parametrize("class_specific", [False, True])
def test_every_method_learns_what_a_template_lays_out(name: str, class_specific: bool) -> None:
    changes = {**DEFAULT, "prompt.template": EMOJI, "prompt.class-specific": class_specific}
    page = (ROOT / "docs" / "methods" / f"{name}.md").read_text()
    if "`prompt.template` and `prompt.depth` are refused" in page:
        with pytest.raises(UsageError, match=f"{name} has a template of its own"):
            make_method(name, **changes).build()
        return
    head = make_method(name, **changes).build()
    assert head.ctx_shape == (4,) * class_specific + (5, 32)
    texts = head.encode()
    texts = texts[0] if isinstance(texts, tuple) else texts
    assert texts.shape[-2:] == (4, 64)
    assert texts.requires_grad


def test_a_shorter_prompt_has_the_first_vectors() -> None:
    changes = {**DEFAULT, "prompt.template": EMOJI, "fedpha.shortest": 1}
    method = make_method("fedpha", **changes)
    lengths = set()
    for client_id in range(8):
        work = make_work(method, method.build(), client_id=client_id)
        n_ctx = len(work.head.used)
        assert work.head.local_encoder.template.first(n_ctx) == work.head.local_encoder.template
        assert work.head.local_encoder.n_ctx == n_ctx
        work.head.trained.fill_(1)
        assert work.head.encode().shape == (4, 64)
        lengths.add(n_ctx)
    assert len(lengths) > 2


def test_the_anchor_of_fedpgps_code_is_the_templates_sentence() -> None:
    template = "{soft:a drawing of} {class}, {soft:2}."
    released = {"compat": "released", "prompt.template": template}
    assert make_method("fedpgp", **DEFAULT, **released).sentence() == "a drawing of {}, X X."
    task = make_method("fedpgp", **DEFAULT, **(released | {"compat": "paper"})).sentence()
    assert task == "a drawing of {}."


def test_the_pages_examples() -> None:
    page = (ROOT / "docs" / "prompts.md").read_text()
    examples = re.findall(r"^pfedmoap run (.*)$", page, re.MULTILINE)
    assert len(examples) > 5
    for example in examples:
        changes = config.parse_words(shlex.split(example, comments=True))
        for key in ("prompt.names", "prompt.verbalizer"):  # the file is tested with the setting
            changes.pop(key, None)
        assert "prompt.template" in changes
        make_method("promptfl", **DEFAULT, **changes).build()
    (wrong, line), *more = re.findall(r"^\$ .*prompt\.template='(.*)'\n(.*)$", page, re.MULTILINE)
    assert not more
    with pytest.raises(UsageError) as raised:
        config.parse({"prompt.template": wrong})
    assert str(raised.value) == line.removeprefix("pfedmoap: ")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["promptfl", "pfedmoap"])
def test_a_run_with_a_template(method: str, federate: Federate) -> None:
    template = {**DEFAULT, "prompt.template": EMOJI}
    run = federate("emoji", method=method, flat=template)
    first, second = (record.train_loss or 0.0 for record in run.rounds()[1:])
    assert 0 < second < first
    state = checkpoint.load(run.path)
    start = make_method(method, **template).build().ctx
    prompts = [state.shared["ctx"], *(tensors["ctx"] for tensors in state.pool.values())]
    assert all(prompt.shape == (5, 32) for prompt in prompts)
    assert not any(torch.equal(prompt, start) for prompt in prompts)
    # CoOp's prompt by either way leaves the same bytes
    keys = federate("keys", method=method)
    text = federate("text", method=method, flat=DEFAULT | {"prompt.template": "{soft:4} {class}."})
    assert rounds(text) == rounds(keys)
    assert tensor_files(text) == tensor_files(keys)
