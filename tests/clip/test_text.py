"""The text tower as a function of the context equals a plain full-length forward of open_clip's."""

import copy
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pfedmoap_flwr.clip import prefix
from pfedmoap_flwr.clip.text import PromptEncoder
from pfedmoap_flwr.clip.words import embed_words, encode_text

LENGTH = 32
NAMES = (
    "cat",
    "forget-me-not",
    "Boeing 737-800",
    "annual_crop_land",
    "pizza (sliced)",  # its ")" and the full stop are one token
    "pneumonoultramicroscopicsilicovolcanoconiosis",
    "rose",
)
TEXT = {
    "context_length": LENGTH,
    "vocab_size": 49408,
    "width": 64,
    "heads": 4,
    "layers": 3,
}
TOWERS: dict[str, dict[str, Any]] = {
    "flat": {},
    "flat-quickgelu": {"quick_gelu": True},
    "custom": {"custom_text": True},
    "custom-layerscale": {"custom_text": True, "text_cfg": {"ls_init_value": 0.5}},
    "custom-bias": {"custom_text": True, "text_cfg": {"proj_bias": True}},
    "no-projection": {"custom_text": True, "text_cfg": {"proj_type": "none"}, "embed_dim": 64},
    "eos-pooled": {"custom_text": True, "text_cfg": {"pool_type": "eos", "eos_id": 49407}},
}
OTHER_TOWERS: dict[str, dict[str, Any]] = {
    "both-ways": {"custom_text": True, "text_cfg": {"no_causal_mask": True}},
    "both-ways-flat": {"text_cfg": {"no_causal_mask": True}},
    "last": {"custom_text": True, "text_cfg": {"no_causal_mask": True, "pool_type": "last"}},
    "causal-last": {"text_cfg": {"pool_type": "last"}},
    "class-token": {"custom_text": True, "text_cfg": {"embed_cls": True}},
    "qk-norm": {"custom_text": True, "text_cfg": {"qk_norm": True}},
    "coca": {
        "multimodal_cfg": {"width": 64, "heads": 4, "layers": 1, "context_length": LENGTH},
        "text_cfg": {"embed_cls": True, "output_tokens": True},
        "vision_cfg": {"attentional_pool": True, "output_tokens": True, "attn_pooler_heads": 4},
        "custom_text": True,
    },
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    # On towers this small a second thread gains nothing, and loses much where cores are shared.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def model(tower: str) -> nn.Module:
    """A small open_clip model whose random weights are large enough to tell one token from another.

    open_clip's own initial values are so small that a mistake would hide in the rounding.
    """
    changes = {**TOWERS, **OTHER_TOWERS}[tower]
    vision = {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8}
    config = {
        "embed_dim": 48,
        **changes,
        "text_cfg": TEXT | changes.get("text_cfg", {}),
        "vision_cfg": vision | changes.get("vision_cfg", {}),
    }
    with TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        (Path(folder) / f"text-{tower}.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder)
        made: nn.Module = open_clip.create_model(f"text-{tower}", pretrained=None)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in made.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() < 2:
            parameter.data += 0.2 * noise
        else:
            scale = 0.7 if "embedding" in name else 1.2 * parameter.shape[-1] ** -0.5
            parameter.data = scale * noise
    return made.eval().requires_grad_(False)


@functools.cache
def tokenizer() -> Any:
    return open_clip.SimpleTokenizer(context_length=LENGTH)


def random_ctx(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, 64, generator=generator, dtype=torch.float64).to(dtype)


def coop_prompts(
    clip: nn.Module, ctx: Tensor, names: tuple[str, ...], position: str, tokens: Any = None
) -> tuple[Tensor, Tensor]:
    """Ids and embeddings of full-length prompts, put together as CoOp does, class by class."""
    text: Any = getattr(clip, "text", clip)
    tokens = tokens or tokenizer()
    n_ctx = ctx.shape[-2]
    names = tuple(name.replace("_", " ") for name in names)
    ids = tokens([" ".join(["X"] * n_ctx) + f" {name}." for name in names])
    words = text.token_embedding(ids).detach()
    ctx = ctx.expand(len(names), -1, -1)
    prompts = []
    for c, name in enumerate(names):
        n = len(tokens.encode(name))
        sos, content = words[c, :1], words[c, 1 + n_ctx :]
        half = n_ctx // 2
        pieces = {
            "end": [sos, ctx[c], content],
            "middle": [sos, ctx[c, :half], content[:n], ctx[c, half:], content[n:]],
            "front": [sos, content[:n], ctx[c], content[n:]],
        }
        prompts.append(torch.cat(pieces[position]))
    return ids, torch.stack(prompts)


def reference(
    clip: nn.Module,
    ctx: Tensor,
    names: tuple[str, ...] = NAMES,
    position: str = "end",
    tokens: Any = None,
) -> Tensor:
    """CoOp's TextEncoder: every class at full length, every module open_clip's own."""
    text: Any = getattr(clip, "text", clip)
    ids, x = coop_prompts(clip, ctx, names, position, tokens)
    x = text.transformer(x + text.positional_embedding, attn_mask=text.attn_mask)
    x = text.ln_final(x)[torch.arange(len(ids)), ids.argmax(dim=-1)]
    if isinstance(text.text_projection, nn.Linear):
        x = text.text_projection(x)
    elif text.text_projection is not None:
        x = x @ text.text_projection
    return x / x.norm(dim=-1, keepdim=True)


def hooked_reference(clip: Any, ctx: Tensor, position: str = "end") -> Tensor:
    """open_clip's own encode_text, with a hook that swaps the embeddings for those of prompts."""
    ids, x = coop_prompts(clip, ctx, NAMES, position)
    embedding = getattr(clip, "text", clip).token_embedding
    handle = embedding.register_forward_hook(lambda *_: x)
    try:
        return F.normalize(clip.encode_text(ids), dim=-1)
    finally:
        handle.remove()


def value_and_gradient(f: Callable[[Tensor], Tensor], ctx: Tensor) -> tuple[Tensor, Tensor]:
    ctx = ctx.clone().requires_grad_()
    features = f(ctx)
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((features * weights.to(features)).sum(), ctx)
    return features.detach(), gradient


def relative(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("tower", TOWERS)
def test_plain_words_as_context_give_open_clips_features(tower: str) -> None:
    clip: Any = model(tower)
    words = "a blurry photo of a"
    ctx = embed_words(clip, tokenizer(), words)
    encoder = PromptEncoder(clip, tokenizer(), NAMES, n_ctx=len(ctx))
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
        clip, tokenizer(), NAMES, n_ctx=n_ctx, position=position, class_specific=class_specific
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
    encoder = PromptEncoder(clip, tokenizer(), NAMES, n_ctx=4, position=position)
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
        model(tower), tokenizer(), NAMES, n_ctx=3, class_specific=class_specific
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
    encoder = PromptEncoder(model(tower), tokenizer(), names, n_ctx=16, position=position)
    ctx = random_ctx(16)
    torch.set_num_threads(2)  # where several threads add to one gradient, their order shows
    try:
        runs = [value_and_gradient(encoder, ctx) for _ in range(4)]
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


def test_a_class_does_not_depend_on_the_others() -> None:
    clip, ctx = model("flat"), random_ctx(4)
    features = PromptEncoder(clip, tokenizer(), NAMES, n_ctx=4)(ctx)
    backwards = PromptEncoder(clip, tokenizer(), NAMES[::-1], n_ctx=4)(ctx)
    assert relative(backwards.flip(0), features) < 1e-5
    for c, name in enumerate(NAMES):
        alone = PromptEncoder(clip, tokenizer(), [name], n_ctx=4)(ctx)
        assert relative(alone[0], features[c]) < 1e-5
    assert (torch.cdist(features, features) + 9 * torch.eye(len(NAMES)) > 1e-2).all()


@pytest.mark.parametrize("tower", ["flat", "custom", "both-ways", "coca"])
def test_the_model_is_left_as_it_was(tower: str) -> None:
    clip = model(tower)
    modules = [(name, id(m)) for name, m in clip.named_modules()]
    before = {name: value.clone() for name, value in clip.state_dict().items()}
    ctx = random_ctx(4).requires_grad_()
    PromptEncoder(clip, tokenizer(), NAMES, n_ctx=4)(ctx).sum().backward()
    assert modules == [(name, id(m)) for name, m in clip.named_modules()]
    assert not any(m._forward_hooks for m in clip.modules())
    after = clip.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(parameter.grad is None for parameter in clip.parameters())


@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("tower", OTHER_TOWERS)
def test_other_towers_pass_through_their_own_forward(tower: str, position: Any) -> None:
    clip = model(tower)
    encoder = PromptEncoder(clip, tokenizer(), NAMES, n_ctx=4, position=position)
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
    encoder = PromptEncoder(clip, siglip_tokens, NAMES, n_ctx=4)
    texts = [f"a photo of a {name.replace('_', ' ')}." for name in NAMES]
    assert relative(encoder(ctx), encode_text(clip, siglip_tokens, texts)) < 1e-5
    long = " ".join(["rose"] * (LENGTH - 5))
    PromptEncoder(clip, siglip_tokens, [long], n_ctx=4)
    with pytest.raises(ValueError, match="too many"):
        PromptEncoder(clip, siglip_tokens, [f"{long} rose"], n_ctx=4)


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
    encoder = PromptEncoder(clip, tokenizer(), NAMES, n_ctx=3)
    assert "not built from open_clip's own" in str(encoder.fallback)
    ctx = encoder.embed("photo of a")
    texts = [f"photo of a {name.replace('_', ' ')}." for name in NAMES]
    assert relative(encoder(ctx), encode_text(clip, tokenizer(), texts)) < 1e-5


def test_a_tower_that_cannot_be_given_embeddings_is_named() -> None:
    with pytest.raises(ValueError, match="OtherTower: given the embeddings of words"):
        PromptEncoder(OtherModel(OtherTower(deaf=True)), tokenizer(), NAMES, n_ctx=3)
    tower = OtherTower()
    tower.transformer = nn.Identity()  # type: ignore[assignment]
    with pytest.raises(ValueError, match="OtherTower: it has no table of token embeddings"):
        PromptEncoder(OtherModel(tower), tokenizer(), NAMES, n_ctx=3)


def test_a_tower_that_only_looks_causal_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clip, ctx, encode = model("flat"), random_ctx(3), prefix.encode
    monkeypatch.setattr(prefix, "encode", lambda text, *a: encode(text, *a).roll(1, dims=-1))
    with pytest.warns(UserWarning, match="features differ"):
        encoder = PromptEncoder(clip, tokenizer(), NAMES, n_ctx=3)
    assert encoder.fallback is not None
    assert relative(encoder(ctx), reference(clip, ctx)) < 1e-5


@pytest.mark.parametrize("tower", ["flat", "both-ways"])
def test_a_name_too_long_for_the_tower(tower: str) -> None:
    fits = " ".join(["rose"] * (LENGTH - 3 - 4))
    encoder = PromptEncoder(model(tower), tokenizer(), ["cat", fits], n_ctx=4)
    assert encoder(random_ctx(4)).isfinite().all()
    with pytest.raises(
        ValueError, match=r"rose rose.* takes 33 tokens .* reads 32: 1 too many; shorten"
    ):
        PromptEncoder(model(tower), tokenizer(), ["cat", f"{fits} rose"], n_ctx=4)
    with pytest.raises(ValueError, match=r"cat.* takes 34 tokens"):
        PromptEncoder(model(tower), tokenizer(), ["cat"], n_ctx=30)


def test_impossible_settings() -> None:
    clip = model("flat")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"n_ctx": 0}, "n_ctx is 0"),
        ({"position": "back"}, 'position is "back"'),
        ({"classnames": []}, "at least one name"),
        ({"classnames": ["cat", " "]}, "none empty"),
    ]
    for wrong, match in cases:
        with pytest.raises(ValueError, match=match):
            PromptEncoder(clip, tokenizer(), **{"classnames": NAMES, "n_ctx": 4, **wrong})
    encoder = PromptEncoder(clip, tokenizer(), NAMES, n_ctx=4)
    for shape in [(5,), (), (4, 4, 3)]:
        with pytest.raises(ValueError, match=r"last dimensions must be \(4, 64\)"):
            encoder(random_ctx(*shape))
    specific = PromptEncoder(clip, tokenizer(), NAMES, n_ctx=4, class_specific=True)
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
        clip, tokenizer(), names, n_ctx=n_ctx, position=position, class_specific=class_specific
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
    encoder = PromptEncoder(clip, tokenizer(), NAMES, n_ctx=12)
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
    encoder = PromptEncoder(clip, tokenizer(), NAMES, n_ctx=4)
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
    encoder = PromptEncoder(clip, tokenizer(), NAMES, n_ctx=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = value_and_gradient(encoder, ctx)[0], reference(clip, ctx)
    assert relative(ours, expected) < 2 * relative(theirs, expected) + 1e-3
    half = model.__wrapped__("flat").bfloat16()
    ours, gradient = value_and_gradient(PromptEncoder(half, tokenizer(), NAMES, n_ctx=4), ctx)
    assert (ours.dtype, gradient.dtype) == (torch.bfloat16, torch.float32)
    theirs = reference(half, ctx.bfloat16())
    assert relative(ours.float(), expected) < 2 * relative(theirs.float(), expected) + 1e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tower", ["flat", "both-ways"])
def test_on_cuda_against_float64(tower: str, dtype: torch.dtype) -> None:
    clip = model.__wrapped__(tower)
    ctx = random_ctx(2, 4)
    exact = PromptEncoder(clip.double(), tokenizer(), NAMES, n_ctx=4)
    expected = value_and_gradient(exact, ctx.double())
    encoder = PromptEncoder(clip.to("cuda", dtype), tokenizer(), NAMES, n_ctx=4)
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
    encoder = PromptEncoder(clip, tokens, names, n_ctx=16)
    assert encoder.fallback is None
    assert (encoder.width, encoder.embed_dim) == (512, 1024)
    ctx = 0.02 * torch.randn(16, 512, generator=torch.Generator().manual_seed(0))
    ours = value_and_gradient(encoder, ctx)
    theirs = value_and_gradient(lambda c: reference(clip, c, names, "end", tokens), ctx)
    assert relative(ours[0], theirs[0]) < 1e-5
    assert relative(ours[1], theirs[1]) < 1e-5
    assert relative(encoder(ctx.flip(0)), theirs[0]) > 1e-4
