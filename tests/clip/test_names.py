"""Several names of a class: the mean of their features, and what a file of names may say."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pfedmoap_flwr.clip.names import NamesEncoder, read_names
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
