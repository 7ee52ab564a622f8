"""Text towers that are not open_clip's plain causal one pass through their own forward."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pfedmoap_flwr.clip import prefix
from pfedmoap_flwr.clip.text import PromptEncoder
from pfedmoap_flwr.clip.words import embed_words, encode_text
from support.texts import (
    LENGTH,
    NAMES,
    OTHER_TOWERS,
    hooked_reference,
    layout,
    model,
    random_ctx,
    reference,
    relative,
    tokenizer,
    value_and_gradient,
)


@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("tower", OTHER_TOWERS)
def test_other_towers_pass_through_their_own_forward(tower: str, position: Any) -> None:
    clip = model(tower)
    encoder = PromptEncoder(clip, tokenizer(), NAMES, layout(4, position))
    assert encoder.fallback is not None
    ctx = random_ctx(4)
    ours = value_and_gradient(encoder, ctx)
    theirs = value_and_gradient(lambda c: hooked_reference(clip, c, position), ctx)
    assert relative(ours[0], theirs[0]) < 1e-5
    assert relative(ours[1], theirs[1]) < 1e-5
    assert theirs[1].norm() > 1e-3


def siglip_tokens(texts: list[str], context_length: int = LENGTH) -> Tensor:
    """Ids as SigLIP's tokenizer lays them out: no SOS, no punctuation, padded with EOT."""
    rows = [tokenizer().encode(text.replace(".", "")) for text in texts]
    ids = torch.ones(len(rows), context_length, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : min(len(row), context_length - 1)] = torch.tensor(row[: context_length - 1])
    return ids


@pytest.mark.parametrize("tower", ["last", "qk-norm"])
def test_another_layout_of_special_tokens(tower: str) -> None:
    clip = model(tower)
    ctx = embed_words(clip, siglip_tokens, "a photo of a")
    assert len(ctx) == 4
    encoder = PromptEncoder(clip, siglip_tokens, NAMES, layout(4))
    texts = [f"a photo of a {name.replace('_', ' ')}." for name in NAMES]
    assert relative(encoder(ctx), encode_text(clip, siglip_tokens, texts)) < 1e-5
    long = " ".join(["rose"] * (LENGTH - 5))
    PromptEncoder(clip, siglip_tokens, [long], layout(4))
    with pytest.raises(ValueError, match="too many"):
        PromptEncoder(clip, siglip_tokens, [f"{long} rose"], layout(4))


class Transformers(nn.Module):
    """The interface of a Hugging Face encoder, in short."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(49408, 16)

    def get_input_embeddings(self) -> nn.Module:
        return self.words


class OtherTower(nn.Module):
    context_length = LENGTH

    def __init__(self, deaf: bool = False) -> None:
        super().__init__()
        self.transformer = Transformers()
        self.deaf = deaf

    def forward(self, ids: Tensor) -> Tensor:
        embedding = self.transformer.words
        words = F.embedding(ids, embedding.weight) if self.deaf else embedding(ids)
        return words.cumsum(dim=1).tanh().mean(dim=1)


class OtherModel(nn.Module):
    def __init__(self, text: nn.Module) -> None:
        super().__init__()
        self.text = text

    def encode_text(self, ids: Tensor) -> Tensor:
        features: Tensor = self.text(ids)
        return features


def test_a_tower_of_another_library() -> None:
    clip = OtherModel(OtherTower())
    encoder = PromptEncoder(clip, tokenizer(), NAMES, layout(3))
    assert "not built from open_clip's own" in str(encoder.fallback)
    ctx = encoder.embed("photo of a")
    texts = [f"photo of a {name.replace('_', ' ')}." for name in NAMES]
    assert relative(encoder(ctx), encode_text(clip, tokenizer(), texts)) < 1e-5


def test_a_tower_that_cannot_be_given_embeddings_is_named() -> None:
    with pytest.raises(ValueError, match="OtherTower: given the embeddings of words"):
        PromptEncoder(OtherModel(OtherTower(deaf=True)), tokenizer(), NAMES, layout(3))
    tower = OtherTower()
    tower.transformer = nn.Identity()  # type: ignore[assignment]
    with pytest.raises(ValueError, match="OtherTower: it has no table of token embeddings"):
        PromptEncoder(OtherModel(tower), tokenizer(), NAMES, layout(3))


def test_a_tower_that_only_looks_causal_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clip, ctx, encode = model("flat"), random_ctx(3), prefix.encode
    monkeypatch.setattr(prefix, "encode", lambda text, *a: encode(text, *a).roll(1, dims=-1))
    with pytest.warns(UserWarning, match="features differ"):
        encoder = PromptEncoder(clip, tokenizer(), NAMES, layout(3))
    assert encoder.fallback is not None
    assert relative(encoder(ctx), reference(clip, ctx)) < 1e-5
