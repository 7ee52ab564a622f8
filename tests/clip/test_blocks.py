"""A text tower's first blocks: what open_clip computes when the other blocks do nothing."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pfedmoap_flwr.clip.blocks import first_blocks
from pfedmoap_flwr.clip.text import PromptEncoder
from pfedmoap_flwr.errors import UsageError
from support.models import make
from support.texts import (
    NAMES,
    OTHER_TOWERS,
    TOWERS,
    hooked_reference,
    layout,
    model,
    random_ctx,
    relative,
    tokenizer,
    value_and_gradient,
)
from support.tiny import frozen_clip


def idle_after(clip: nn.Module, count: int) -> Any:
    """A copy of a model whose later blocks give back what they got."""
    other: Any = copy.deepcopy(clip)
    for block in getattr(other, "text", other).transformer.resblocks[count:]:
        block.register_forward_hook(lambda block, inputs, output: inputs[0])
    return other


@pytest.mark.parametrize("tower", [*TOWERS, *OTHER_TOWERS])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_first_blocks_are_open_clips_own(tower: str, count: int) -> None:
    whole = model(tower)
    encoder = PromptEncoder(first_blocks(whole, count), tokenizer(), NAMES, layout(4))
    # Towers that are encoded without repeating what prompts share still are
    assert (encoder.fallback is None) == (tower in TOWERS)
    ctx, expected = random_ctx(4), idle_after(whole, count)
    ours = value_and_gradient(encoder, ctx)
    theirs = value_and_gradient(lambda c: hooked_reference(expected, c, "end"), ctx)
    assert relative(ours[0], theirs[0]) < 1e-5
    assert relative(ours[1], theirs[1]) < 1e-5
    # Each block has a say
    if count < 3:
        full: Callable[[Tensor], Tensor] = PromptEncoder(whole, tokenizer(), NAMES, layout(4))
        assert relative(ours[0], full(ctx)) > 0.01


def test_a_twin_shares_all_weights_and_leaves_the_model_as_it_is() -> None:
    whole: Any = model("flat")
    before = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    twin: Any = first_blocks(whole, 1)
    assert len(twin.transformer.resblocks) == 1
    assert len(whole.transformer.resblocks) == 3
    held = dict(whole.named_parameters())
    assert all(parameter is held[name] for name, parameter in twin.named_parameters())
    assert all(torch.equal(tensor, before[n]) for n, tensor in whole.state_dict().items())


def test_a_tower_of_another_kind_says_so() -> None:
    other: Any = nn.Module()
    other.text = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="its text tower, Linear, has no blocks to leave out"):
        first_blocks(other, 1)


def test_a_frozen_clip_says_whose_tower_it_is(tmp_path: Any) -> None:
    _, path = make("vit", tmp_path)
    clip = frozen_clip("made-vit", path)
    clip.model.transformer = nn.Identity()
    with pytest.raises(UsageError, match=r"clip\.model=made-vit: .* no blocks to leave out"):
        clip.encoder((("a",),), layout(2), False, blocks=1)
