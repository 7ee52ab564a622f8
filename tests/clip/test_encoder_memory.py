"""A frozen prompt is encoded once in a process, and what is remembered is right to the last bit."""

from typing import Any

import pytest
import torch

from pfedmoap_flwr.clip import prefix
from pfedmoap_flwr.clip.text import PromptEncoder
from support.texts import layout
from support.tiny import frozen_clip

NAMES = ("cat", "red panda", "dog")


@pytest.fixture
def encoder() -> PromptEncoder:
    clip = frozen_clip()
    return PromptEncoder(clip.model, clip.tokenizer, NAMES, layout(4))


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts each call of the text tower gets."""
    counts: list[int] = []
    encode = prefix.encode

    def counted(text: Any, shared: Any, *rest: Any) -> Any:
        counts.append(len(shared))
        return encode(text, shared, *rest)

    monkeypatch.setattr(prefix, "encode", counted)
    return counts


def prompts(count: int) -> torch.Tensor:
    return torch.randn(count, 4, 32, generator=torch.Generator().manual_seed(0))


def test_a_prompt_is_encoded_once_however_many_borrow_it(
    encoder: PromptEncoder, encoded: list[int]
) -> None:
    pool = prompts(4)
    with torch.no_grad():
        first = encoder(pool[[0, 1, 2]])
        second = encoder(pool[[2, 0, 3]])
        alone = encoder(pool[1].clone())
    assert sum(encoded) == 4
    assert torch.equal(first[[2, 0]], second[:2])
    assert torch.equal(alone, first[1])


def test_what_is_remembered_does_not_depend_on_the_company(encoder: PromptEncoder) -> None:
    pool = prompts(5)
    clip = frozen_clip()
    other = PromptEncoder(clip.model, clip.tokenizer, NAMES, layout(4))
    with torch.no_grad():
        together = encoder(pool)
        apart = torch.stack([other(prompt) for prompt in pool.flip(0)]).flip(0)
    assert torch.equal(together, apart)
    torch.testing.assert_close(together, encoder(pool.requires_grad_()).detach())


def test_training_is_never_served_from_memory(encoder: PromptEncoder) -> None:
    ctx = prompts(1)[0]
    with torch.no_grad():
        remembered = encoder(ctx)
    ctx.requires_grad_()
    features = encoder(ctx)
    assert features.requires_grad
    torch.testing.assert_close(features.detach(), remembered)


def test_a_changed_prompt_is_another_prompt(encoder: PromptEncoder) -> None:
    ctx = prompts(1)[0]
    with torch.no_grad():
        before = encoder(ctx)
        ctx[0, 0] += 1e-3
        assert not torch.equal(encoder(ctx), before)


def test_nobody_can_spoil_what_is_remembered(encoder: PromptEncoder) -> None:
    ctx = prompts(1)[0]
    with torch.no_grad():
        expected = encoder(ctx).clone()
        encoder(ctx).zero_()
        assert torch.equal(encoder(ctx), expected)


def test_memory_is_bounded_and_the_oldest_go_first(
    encoder: PromptEncoder, encoded: list[int]
) -> None:
    pool = prompts(4)
    with torch.no_grad():
        size = encoder(pool[0]).nbytes
        encoder.memory = 2 * size
        encoder(pool[1])
        encoder(pool[0])
        encoder(pool[2])
        encoded.clear()
        encoder(pool[0])
        assert encoded == []
        encoder(pool[1])
        assert encoded == [1]
        encoder.memory = 0
        encoder(pool[3])
        encoded.clear()
        encoder(pool[3])
        assert encoded == []
        encoder(pool[1])
        assert encoded == [1]
