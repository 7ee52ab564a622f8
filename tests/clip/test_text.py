"""The text tower as a function of the context equals a plain full-length forward of open_clip's."""

import copy
from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pfedmoap_flwr.clip import prefix
from pfedmoap_flwr.clip.text import PromptEncoder
from pfedmoap_flwr.clip.words import embed_words, encode_text
from support.texts import (
    LENGTH,
    NAMES,
    TOWERS,
    layout,
    model,
    random_ctx,
    reference,
    relative,
    tokenizer,
    value_and_gradient,
)


@pytest.mark.parametrize("tower", TOWERS)
def test_plain_words_as_context_give_open_clips_features(tower: str) -> None:
    clip: Any = model(tower)
    words = "a blurry photo of a"
    ctx = embed_words(clip, tokenizer(), words)
    encoder = PromptEncoder(clip, tokenizer(), NAMES, layout(len(ctx)))
    texts = [f"{words} {name.replace('_', ' ')}." for name in NAMES]
    expected = F.normalize(clip.encode_text(tokenizer()(texts)), dim=-1)
    assert encoder.fallback is None
    assert relative(encoder(ctx), expected) < 1e-5
    assert relative(encoder(ctx.flip(0)), expected) > 1e-2
    assert torch.equal(encoder.embed(words), ctx)
    assert (encoder.width, encoder.embed_dim) == (64, expected.shape[1])


@pytest.mark.slow
@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("tower", TOWERS)
def test_any_context_gives_the_full_length_features_and_gradients(
    tower: str, position: Any, class_specific: bool
) -> None:
    clip, n_ctx = model(tower), 5
    encoder = PromptEncoder(
        clip, tokenizer(), NAMES, layout(n_ctx, position), class_specific=class_specific
    )
    assert encoder.fallback is None
    ctx = random_ctx(*([len(NAMES)] if class_specific else []), n_ctx)
    ours = value_and_gradient(encoder, ctx)
    theirs = value_and_gradient(lambda c: reference(clip, c, NAMES, position), ctx)
    assert relative(ours[0], theirs[0]) < 1e-5
    assert relative(ours[1], theirs[1]) < 1e-5


def test_a_mistake_would_show() -> None:
    ctx = random_ctx(4)
    expected = reference(model("flat"), ctx)

    def changed(tower: str = "flat", **changes: Callable[[Tensor], Tensor]) -> Tensor:
        clip = copy.deepcopy(model(tower))
        for name, change in changes.items():
            weight = clip.get_parameter(name.replace("__", "."))
            weight.data = change(weight.data)
        return reference(clip, ctx)

    mistakes = {
        "order": reference(model("flat"), ctx.flip(0)),
        "no full stop": reference(model("flat"), ctx, tuple(f"{name} ," for name in NAMES)),
        "class": expected.roll(1, 0),
        "position": changed(positional_embedding=lambda weight: weight.roll(1, 0)),
        "activation": changed("flat-quickgelu"),
        "last layer": changed(
            transformer__resblocks__2__attn__in_proj_bias=lambda weight: weight + 0.1
        ),
    }
    assert {name for name, wrong in mistakes.items() if relative(wrong, expected) < 1e-3} == set()


@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_float64(position: Any) -> None:
    clip = model.__wrapped__("flat").double()
    encoder = PromptEncoder(clip, tokenizer(), NAMES, layout(4, position))
    ctx = random_ctx(4, dtype=torch.float64)
    ours = value_and_gradient(encoder, ctx)
    theirs = value_and_gradient(lambda c: reference(clip, c, NAMES, position), ctx)
    assert ours[0].dtype == torch.float64
    assert relative(ours[0], theirs[0]) < 1e-12
    assert relative(ours[1], theirs[1]) < 1e-12


@pytest.mark.parametrize("tower", ["flat", "both-ways"])
@pytest.mark.parametrize("class_specific", [False, True])
def test_many_prompts_at_once_are_each_encoded_alone(tower: str, class_specific: bool) -> None:
    encoder = PromptEncoder(
        model(tower), tokenizer(), NAMES, layout(3), class_specific=class_specific
    )
    ctx = random_ctx(2, 3, *([len(NAMES)] if class_specific else []), 3)
    together = encoder(ctx)
    assert together.shape == (2, 3, len(NAMES), encoder.embed_dim)
    for i in range(2):
        for j in range(3):
            assert relative(together[i, j], encoder(ctx[i, j])) < 1e-5
    assert torch.allclose(together.norm(dim=-1), torch.ones(()))


@pytest.mark.slow
@pytest.mark.parametrize("tower", ["flat", "both-ways"])
@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_a_repeat_gives_the_same_bytes(tower: str, position: Any) -> None:
    names = [f"rose {i}" for i in range(60)]
    encoder = PromptEncoder(model(tower), tokenizer(), names, layout(16, position))
    ctx = random_ctx(16)
    torch.set_num_threads(2)  # where several threads add to one gradient, their order shows
    try:
        runs = [value_and_gradient(encoder, ctx) for _ in range(4)]
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


def test_a_class_does_not_depend_on_the_others() -> None:
    clip, ctx = model("flat"), random_ctx(4)
    features = PromptEncoder(clip, tokenizer(), NAMES, layout(4))(ctx)
    backwards = PromptEncoder(clip, tokenizer(), NAMES[::-1], layout(4))(ctx)
    assert relative(backwards.flip(0), features) < 1e-5
    for c, name in enumerate(NAMES):
        alone = PromptEncoder(clip, tokenizer(), [name], layout(4))(ctx)
        assert relative(alone[0], features[c]) < 1e-5
    assert (torch.cdist(features, features) + 9 * torch.eye(len(NAMES)) > 1e-2).all()


@pytest.mark.parametrize("tower", ["flat", "custom", "both-ways", "coca"])
def test_the_model_is_left_as_it_was(tower: str) -> None:
    clip = model(tower)
    modules = [(name, id(m)) for name, m in clip.named_modules()]
    before = {name: value.clone() for name, value in clip.state_dict().items()}
    ctx = random_ctx(4).requires_grad_()
    PromptEncoder(clip, tokenizer(), NAMES, layout(4))(ctx).sum().backward()
    assert modules == [(name, id(m)) for name, m in clip.named_modules()]
    assert not any(m._forward_hooks for m in clip.modules())
    after = clip.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(parameter.grad is None for parameter in clip.parameters())


@pytest.mark.parametrize("tower", ["flat", "both-ways"])
def test_a_name_too_long_for_the_tower(tower: str) -> None:
    fits = " ".join(["rose"] * (LENGTH - 3 - 4))
    encoder = PromptEncoder(model(tower), tokenizer(), ["cat", fits], layout(4))
    assert encoder(random_ctx(4)).isfinite().all()
    with pytest.raises(
        ValueError, match=r"rose rose.* takes 33 tokens .* reads 32: 1 too many; shorten"
    ):
        PromptEncoder(model(tower), tokenizer(), ["cat", f"{fits} rose"], layout(4))
    with pytest.raises(ValueError, match=r"cat.* takes 34 tokens"):
        PromptEncoder(model(tower), tokenizer(), ["cat"], layout(30))


def test_impossible_settings() -> None:
    clip = model("flat")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"classnames": []}, "at least one name"),
        ({"classnames": ["cat", " "]}, "none empty"),
    ]
    for wrong, match in cases:
        with pytest.raises(ValueError, match=match):
            PromptEncoder(clip, tokenizer(), **{"template": layout(4), **wrong})
    encoder = PromptEncoder(clip, tokenizer(), NAMES, layout(4))
    for shape in [(5,), (), (4, 4, 3)]:
        with pytest.raises(ValueError, match=r"last dimensions must be \(4, 64\)"):
            encoder(random_ctx(*shape))
    specific = PromptEncoder(clip, tokenizer(), NAMES, layout(4), class_specific=True)
    with pytest.raises(ValueError, match=r"must be \(7, 4, 64\)"):
        specific(random_ctx(4))


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 11), min_size=1, max_size=9),
    n_ctx=st.integers(1, 16),
    position=st.sampled_from(["end", "middle", "front"]),
    class_specific=st.booleans(),
)
def test_names_of_any_length(
    lengths: list[int], n_ctx: int, position: Any, class_specific: bool
) -> None:
    clip = model("flat")
    words = ["rose", "tree", "red", "old", "tall", "wild", "blue", "far", "low", "dry", "big"]
    names = tuple(" ".join(words[:n]) for n in lengths)
    encoder = PromptEncoder(
        clip, tokenizer(), names, layout(n_ctx, position), class_specific=class_specific
    )
    ctx = random_ctx(*([len(names)] if class_specific else []), n_ctx)
    assert relative(encoder(ctx), reference(clip, ctx, names, position)) < 1e-5


@settings(deadline=None)
@given(
    ends=st.lists(st.integers(1, 40), min_size=1, max_size=60), width=st.sampled_from([8, 64, 512])
)
def test_packing_places_every_token_once(ends: list[int], width: int) -> None:
    size = 3
    ends = [size + end for end in ends]
    packing = prefix.pack(ends, size, width)
    flat = [
        (int(c), int(place))
        for c, place in torch.stack([packing.classes, packing.places], dim=-1).flatten(0, 1)
    ]
    tokens = {(c, place) for c, end in enumerate(ends) for place in range(size, end)}
    assert tokens <= set(flat)
    assert [flat[i] for i in packing.ends] == [(c, end - 1) for c, end in enumerate(ends)]
    n_places = packing.classes.shape[1]
    for c, at in enumerate(packing.ends.tolist()):
        row, place = divmod(at, n_places)
        own = flat[row * n_places + place - (ends[c] - size) + 1 : at + 1]
        assert own == [(c, p) for p in range(size, ends[c])]
        seen = packing.own[row, place].nonzero().flatten().tolist()
        assert seen == list(range(place - len(own) + 1, place + 1))


def test_shared_tokens_are_computed_once() -> None:
    clip: Any = model("flat")
    encoder = PromptEncoder(clip, tokenizer(), NAMES, layout(12))
    seen: list[int] = []
    handles = [
        block.mlp.register_forward_hook(
            lambda _, inputs, __: seen.append(inputs[0].shape[:2].numel())
        )
        for block in clip.transformer.resblocks
    ]
    encoder(random_ctx(12))
    for handle in handles:
        handle.remove()
    distinct = 13 + sum(len(tokenizer().encode(f"{name}.".replace("_", " "))) + 1 for name in NAMES)
    assert all(distinct <= n <= 1.2 * distinct for n in seen[:-1])
    assert seen[-1] == len(NAMES)


def test_under_vmap_and_functional_grad() -> None:
    clip = model("flat")
    encoder = PromptEncoder(clip, tokenizer(), NAMES, layout(4))
    ctx = random_ctx(3, 4)
    assert relative(torch.func.vmap(encoder)(ctx), encoder(ctx)) < 1e-5
    gradients = torch.func.vmap(torch.func.grad(lambda c: encoder(c)[:, 0].sum()))(ctx)
    ctx.requires_grad_()
    (expected,) = torch.autograd.grad(encoder(ctx)[..., 0].sum(), ctx)
    assert relative(gradients, expected) < 1e-5
    with torch.no_grad():
        assert not encoder(ctx).requires_grad


def test_half_precision_on_the_cpu() -> None:
    clip, ctx = model("flat"), random_ctx(4)
    expected = reference(clip, ctx)
    encoder = PromptEncoder(clip, tokenizer(), NAMES, layout(4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = value_and_gradient(encoder, ctx)[0], reference(clip, ctx)
    assert relative(ours, expected) < 2 * relative(theirs, expected) + 1e-3
    half = model.__wrapped__("flat").bfloat16()
    ours, gradient = value_and_gradient(PromptEncoder(half, tokenizer(), NAMES, layout(4)), ctx)
    assert (ours.dtype, gradient.dtype) == (torch.bfloat16, torch.float32)
    theirs = reference(half, ctx.bfloat16())
    assert relative(ours.float(), expected) < 2 * relative(theirs.float(), expected) + 1e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tower", ["flat", "both-ways"])
def test_on_cuda_against_float64(tower: str, dtype: torch.dtype) -> None:
    clip = model.__wrapped__(tower)
    ctx = random_ctx(2, 4)
    exact = PromptEncoder(clip.double(), tokenizer(), NAMES, layout(4))
    expected = value_and_gradient(exact, ctx.double())
    encoder = PromptEncoder(clip.to("cuda", dtype), tokenizer(), NAMES, layout(4))
    ours = value_and_gradient(encoder, ctx.cuda())
    again = value_and_gradient(encoder, ctx.cuda())
    limit = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}[dtype]
    for a, b in zip(ours, expected, strict=True):
        assert relative(a.double().cpu(), b) < limit
    if encoder.fallback is None:
        assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


def test_encode_text_is_open_clips_own() -> None:
    clip: Any = model("flat")
    texts = [f"a photo of a {i}." for i in range(300)]
    expected = F.normalize(clip.encode_text(tokenizer()(texts)), dim=-1)
    # A tokenizer made for 77 tokens must not hide that this tower reads 32.
    ours = encode_text(clip, open_clip.SimpleTokenizer(), texts)
    assert relative(ours, expected) < 1e-5
    assert not ours.requires_grad
    with pytest.raises(ValueError, match="takes 42 tokens and the text tower reads 32"):
        encode_text(clip, tokenizer(), ["rose " * 40])


@pytest.mark.slow
def test_a_real_tower() -> None:
    clip = open_clip.create_model("RN50-quickgelu", pretrained=None).eval().requires_grad_(False)
    tokens = open_clip.get_tokenizer("RN50-quickgelu")
    names = ("cat", "annual_crop_land")
    encoder = PromptEncoder(clip, tokens, names, layout(16))
    assert encoder.fallback is None
    assert (encoder.width, encoder.embed_dim) == (512, 1024)
    ctx = 0.02 * torch.randn(16, 512, generator=torch.Generator().manual_seed(0))
    ours = value_and_gradient(encoder, ctx)
    theirs = value_and_gradient(lambda c: reference(clip, c, names, "end", tokens), ctx)
    assert relative(ours[0], theirs[0]) < 1e-5
    assert relative(ours[1], theirs[1]) < 1e-5
    assert relative(encoder(ctx.flip(0)), theirs[0]) > 1e-4
