"""Several names of a class: the mean of their features, and what a file of names may say."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pfedmoap_flwr.clip.names import EachName, NamesEncoder, WeighedNames, read_names
from pfedmoap_flwr.clip.text import PromptEncoder
from pfedmoap_flwr.errors import UsageError
from support.texts import (
    layout,
    model,
    random_ctx,
    reference,
    relative,
    tokenizer,
    value_and_gradient,
)

NAMES = (("cat", "house cat", "small animal that purrs"), ("rose",), ("pizza", "flat bread"))


@pytest.mark.parametrize("class_specific", [False, True])
def test_features_are_the_mean_of_open_clips_own(class_specific: bool) -> None:
    clip: Any = model.__wrapped__("flat").double()
    every = [name for own in NAMES for name in own]
    inner = PromptEncoder(clip, tokenizer(), every, layout(3), class_specific=class_specific)
    encoder = NamesEncoder(inner, [3, 1, 2])

    def by_hand(ctx: Tensor) -> Tensor:
        means = []
        for c, own in enumerate(NAMES):
            vectors = ctx[c] if class_specific else ctx
            mean = torch.cat([reference(clip, vectors, (name,)) for name in own]).mean(0)
            means.append(mean / mean.square().sum().sqrt())
        return torch.stack(means)

    ctx = random_ctx(*[3] * class_specific, 3, dtype=torch.float64)
    ours, theirs = value_and_gradient(encoder, ctx), value_and_gradient(by_hand, ctx)
    assert relative(ours[0], theirs[0]) < 1e-12
    assert relative(ours[1], theirs[1]) < 1e-12
    pair = torch.stack([ctx, ctx.flip(-2)])
    assert relative(encoder(pair), torch.stack([encoder(one) for one in pair])) < 1e-12
    assert (encoder.n_ctx, encoder.width, encoder.embed_dim) == (3, 64, 48)


@pytest.mark.parametrize("class_specific", [False, True])
def test_weights_are_a_softmax_over_a_classs_own_names(class_specific: bool) -> None:
    clip: Any = model.__wrapped__("flat").double()
    every = [name for own in NAMES for name in own]
    inner = PromptEncoder(clip, tokenizer(), every, layout(3), class_specific=class_specific)
    names = NamesEncoder(inner, [3, 1, 2])
    ctx = random_ctx(*[3] * class_specific, 3, dtype=torch.float64)
    each = names.each(ctx).detach()

    def by_hand(weights: Tensor) -> Tensor:
        # The largest weight is far from the others, as a softmax over all six would show
        shares = weights.exp()
        sums = [
            (shares[:3, None] * each[:3]).sum(0) / shares[:3].sum(),
            each[3],
            (shares[4:, None] * each[4:]).sum(0) / shares[4:].sum(),
        ]
        return torch.stack([one / one.square().sum().sqrt() for one in sums])

    weights = torch.tensor([0.5, -1.0, 2.0, 9.0, -0.3, 0.7], dtype=torch.float64)

    def ours(weights: Tensor) -> Tensor:
        return WeighedNames(names, lambda: weights)(ctx)

    found, expected = value_and_gradient(ours, weights), value_and_gradient(by_hand, weights)
    assert relative(found[0], expected[0]) < 1e-12
    assert relative(found[1], expected[1]) < 1e-12
    assert torch.equal(ours(torch.zeros(6)), names(ctx))


def test_the_largest_of_a_classs_logits() -> None:
    inner = PromptEncoder(model("flat"), tokenizer(), list("abcdef"), layout(3))
    encoder = EachName(inner, [3, 1, 2])
    logits = torch.tensor([[1.0, 5.0, 2.0, -4.0, 0.0, -1.0], [3.0, -1.0, 2.0, 7.0, -6.0, -5.0]])
    assert encoder.largest(logits).tolist() == [[5.0, -4.0, 0.0], [3.0, 7.0, -5.0]]
    assert encoder(random_ctx(3)).shape == (6, 48)


def test_files_in_toml_and_json(tmp_path: Path) -> None:
    (tmp_path / "names.toml").write_text(
        'rose = "dog rose"\n"red panda" = ["firefox", "red panda"]'
    )
    (tmp_path / "names.json").write_text(
        json.dumps({"rose": "dog rose", "red panda": ["firefox", "red panda"]})
    )
    classes = ["cat", "red panda", "rose"]
    expected = (("cat",), ("firefox", "red panda"), ("dog rose",))
    for file in ("names.toml", "names.json"):
        assert read_names(str(tmp_path / file), classes) == expected
    assert read_names("", classes) == (("cat",), ("red panda",), ("rose",))


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ('{"dog": "hound"}', "there is no class 'dog' .but cat, rose"),
        ('{"rose": []}', "'rose' is no name and no list of names"),
        ('{"rose": ""}', "'rose' is no name"),
        ('{"rose": ["dog rose", " "]}', "'rose' is no name"),
        ('{"rose": [1]}', "'rose' is no name"),
        ('{"rose": {"a": "b"}}', "'rose' is no name"),
        ('["rose"]', "not a table of classes"),
        ('{"rose"', "neither TOML nor .json"),
    ],
)
def test_what_a_file_may_not_say(text: str, wrong: str, tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text(text)
    with pytest.raises(UsageError, match=rf"prompt\.names=.*names\.json: {wrong}") as raised:
        read_names(str(tmp_path / "names.json"), ["cat", "rose"])
    assert "\n" not in str(raised.value)
    with pytest.raises(UsageError, match=r"none\.toml: cannot be read"):
        read_names(str(tmp_path / "none.toml"), ["cat"])
