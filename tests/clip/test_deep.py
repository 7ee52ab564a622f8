"""Deep prompts: vectors that enter deeper layers of the text tower, against open_clip's blocks."""

from typing import Any

import pytest
import torch
from torch import Tensor

from pfedmoap_flwr import methods
from pfedmoap_flwr.clip.template import parse
from pfedmoap_flwr.clip.text import PromptEncoder
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.base import PromptHead
from support import ROOT
from support.federation import Federate, make_method, rounds
from support.texts import (
    LENGTH,
    layout,
    model,
    random_ctx,
    relative,
    tokenizer,
    value_and_gradient,
)

NAMES = ("cat", "red rose", "Boeing 737")


def block_by_block(clip: Any, ctx: Tensor, class_specific: bool) -> Tensor:
    """Features (C, d) of "a {soft:2} {class} {soft:1}." at full length, one class by itself."""
    tokens, features = tokenizer(), []
    for c, name in enumerate(NAMES):
        layers = (ctx[c] if class_specific else ctx).split(3)
        words = tokens.encode(name)
        ids = [tokens.sot_token_id, *tokens.encode("a X X"), *words, *tokens.encode("X .")]
        ids.append(tokens.eot_token_id)
        places = [2, 3, 4 + len(words)]
        x = clip.token_embedding(torch.tensor(ids + [0] * (LENGTH - len(ids))))
        for layer, block in enumerate(clip.transformer.resblocks):
            if layer < len(layers):
                x = torch.stack(
                    [layers[layer][places.index(i)] if i in places else t for i, t in enumerate(x)]
                )
            if layer == 0:
                x = x + clip.positional_embedding
            x = block(x[None], attn_mask=clip.attn_mask)[0]
        x = clip.ln_final(x[len(ids) - 1]) @ clip.text_projection
        features.append(x / x.norm())
    return torch.stack(features)


@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_features_and_gradients_are_open_clips(depth: int, class_specific: bool) -> None:
    clip: Any = model.__wrapped__("flat").double()
    template = parse("a {soft:2} {class} {soft:1}.", len)
    encoder = PromptEncoder(
        clip, tokenizer(), NAMES, template, class_specific=class_specific, depth=depth
    )
    assert encoder.n_ctx == 3 * depth
    ctx = random_ctx(*[3] * class_specific, 3 * depth, dtype=torch.float64)
    ours = value_and_gradient(encoder, ctx)
    theirs = value_and_gradient(lambda c: block_by_block(clip, c, class_specific), ctx)
    assert relative(ours[0], theirs[0]) < 1e-12
    assert relative(ours[1], theirs[1]) < 1e-12
    assert theirs[1].norm(dim=-1).min() > 1e-4


def test_impossible_depths() -> None:
    with pytest.raises(ValueError, match="vectors in 4 layers; the text tower has 3"):
        PromptEncoder(model("flat"), tokenizer(), NAMES, layout(2), depth=4)
    with pytest.raises(ValueError, match="cannot enter its deeper layers: its attention is not"):
        PromptEncoder(model("both-ways-flat"), tokenizer(), NAMES, layout(2), depth=2)


@pytest.mark.parametrize(
    "name", [n for n in methods.names() if issubclass(methods.load(n).head, PromptHead)]
)
def test_every_method_learns_deep_vectors_or_refuses(name: str) -> None:
    method = make_method(name, **{"prompt.depth": 2})
    if "`prompt.depth`" in (ROOT / "docs" / "methods" / f"{name}.md").read_text():
        with pytest.raises(UsageError, match=r"prompt\.depth"):
            method.build()
        return
    head = method.build()
    assert head.ctx_shape == (8, 32)
    head.encode().square().sum().backward()
    assert head.encode().shape[-2:] == (4, 64)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["promptfl", "pfedmoap"])
def test_a_run_with_deep_vectors(method: str, federate: Federate) -> None:
    run = federate("deep", method=method, flat={"prompt.depth": 2})
    first, second = (record.train_loss or 0.0 for record in run.rounds()[1:])
    assert 0 < second < first
    assert rounds(run) != rounds(federate("plain", method=method))
