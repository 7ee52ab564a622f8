"""Templates: how they are read, and that what they lay out is what open_clip itself computes."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pfedmoap_flwr.clip.template import Template, coop, parse
from pfedmoap_flwr.clip.text import PromptEncoder
from support.texts import (
    LENGTH,
    NAMES,
    full_length,
    model,
    random_ctx,
    relative,
    tokenizer,
    value_and_gradient,
)

# Without the one whose last token swallows a comma: here every piece is tokenised by itself
PLAIN = tuple(name.replace("_", " ") for name in NAMES if "(" not in name)
Pieces = Callable[[str], Sequence[str | tuple[int, ...]]]
# Template, whether class-specific, and the prompt by hand: words, and which vectors stand there
CASES: dict[str, tuple[str, bool, Pieces]] = {
    "front": ("{class} {soft:3}.", False, lambda name: [name, (0, 1, 2), "."]),
    "middle": ("{soft:2} {class}{soft:3}.", False, lambda name: [(0, 1), name, (2, 3, 4), "."]),
    "end": ("{soft:4} {class}", False, lambda name: [(0, 1, 2, 3), name]),
    "words after": (
        "{soft:4} {class}, {soft:2} drawn as an emoji.",
        False,
        lambda name: [(0, 1, 2, 3), name, ",", (4, 5), "drawn as an emoji."],
    ),
    "words before and between": (
        "a {soft:2} photo of{soft:1}the {class} in {soft:1} snow",
        False,
        lambda name: ["a", (0, 1), "photo of", (2,), "the", name, "in", (3,), "snow"],
    ),
    "shared ids": (
        "a {soft:2#a} photo {soft:1} of {class} {soft:2#a}{soft:1}.",
        False,
        lambda name: ["a", (0, 1), "photo", (2,), "of", name, (0, 1, 3), "."],
    ),
    "words to start from": (
        "{soft:red photo#a} {class} {soft:red photo#a}",
        False,
        lambda name: [(0, 1), name, (0, 1)],
    ),
    "class-specific": (
        "a photo of {soft:2} {class} {soft:1}.",
        True,
        lambda name: ["a photo of", (0, 1), name, (2,), "."],
    ),
    "class-specific, shared ids": (
        "{soft:1#x} {class} {soft:2} {soft:1#x}.",
        True,
        lambda name: [(0,), name, (1, 2, 0), "."],
    ),
    "within a word": ("x{class} {soft:2}.", False, lambda name: [f"x{name}", (0, 1), "."]),
}
every_case = pytest.mark.parametrize("case", CASES)


def count(words: str) -> int:
    return len(tokenizer().encode(words))


def by_hand(clip: Any, ctx: Tensor, pieces: Pieces) -> tuple[Tensor, Tensor]:
    """Ids and embeddings of full-length prompts, piece by piece."""
    tokens = tokenizer()
    ids, rows = [], []
    for c, name in enumerate(PLAIN):
        own = ctx[c] if ctx.dim() == 3 else ctx
        numbers = [tokens.sot_token_id]
        vectors: dict[int, Tensor] = {}
        for piece in pieces(name):
            if isinstance(piece, str):
                numbers += tokens.encode(piece)
            else:
                vectors |= {len(numbers) + i: own[j] for i, j in enumerate(piece)}
                numbers += tokens.encode("X") * len(piece)
        numbers.append(tokens.eot_token_id)
        numbers += [0] * (LENGTH - len(numbers))
        ids.append(torch.tensor(numbers))
        words = clip.token_embedding(ids[-1]).detach()
        rows.append(torch.stack([vectors.get(i, word) for i, word in enumerate(words)]))
    return torch.stack(ids), torch.stack(rows)


@every_case
def test_features_and_gradients_are_open_clips(case: str) -> None:
    text, class_specific, pieces = CASES[case]
    clip: Any = model.__wrapped__("flat").double()
    template = parse(text, count)
    encoder = PromptEncoder(clip, tokenizer(), PLAIN, template, class_specific=class_specific)
    assert encoder.fallback is None
    size = [len(PLAIN)] * class_specific + [template.n_ctx]
    ctx = random_ctx(*size, dtype=torch.float64)
    ours = value_and_gradient(encoder, ctx)
    theirs = value_and_gradient(lambda c: full_length(clip, *by_hand(clip, c, pieces)), ctx)
    assert relative(ours[0], theirs[0]) < 1e-12
    assert relative(ours[1], theirs[1]) < 1e-12
    # The order of vectors matters, so that a mistake would have shown
    assert relative(encoder(ctx.flip(-2)), theirs[0]) > 1e-3


@every_case
def test_towers_of_another_kind_get_the_same_prompts(case: str) -> None:
    text, class_specific, pieces = CASES[case]
    clip: Any = model("both-ways-flat")
    template = parse(text, count)
    encoder = PromptEncoder(clip, tokenizer(), PLAIN, template, class_specific=class_specific)
    assert encoder.fallback is not None
    ctx = random_ctx(*[len(PLAIN)] * class_specific, template.n_ctx)
    ids, x = by_hand(clip, ctx, pieces)
    handle = clip.token_embedding.register_forward_hook(lambda *_: x)
    try:
        expected = F.normalize(clip.encode_text(ids), dim=-1)
    finally:
        handle.remove()
    assert relative(encoder(ctx), expected) < 1e-5


@pytest.mark.parametrize(
    ("text", "class_specific", "shared"),
    [
        ("a photo of {soft:6} {class}, drawn.", False, 1 + 3 + 6),
        ("{soft:3} photo {soft:3#a} {class} {soft:3#a}.", False, 1 + 3 + 1 + 3),
        ("a photo of {soft:6} {class}.", True, 1 + 3),
        ("{class} of {soft:6}", False, 1),
    ],
)
def test_what_stands_before_the_class_is_computed_once(
    text: str, class_specific: bool, shared: int
) -> None:
    clip: Any = model("flat")
    template = parse(text, count)
    encoder = PromptEncoder(clip, tokenizer(), NAMES, template, class_specific=class_specific)
    seen: list[int] = []
    handles = [
        block.mlp.register_forward_hook(
            lambda _, inputs, __: seen.append(inputs[0].shape[:2].numel())
        )
        for block in clip.transformer.resblocks
    ]
    encoder(random_ctx(*[len(NAMES)] * class_specific, template.n_ctx))
    for handle in handles:
        handle.remove()
    n_soft = sum(map(len, template.soft))
    sentences = [template.fill(name.replace("_", " "))[0] for name in NAMES]
    distinct = shared + sum(2 + n_soft + count(sentence) - shared for sentence in sentences)
    assert all(distinct <= n <= 1.2 * distinct for n in seen[:-1])
    assert seen[-1] == len(NAMES)


def test_words_that_grow_together_with_some_names_are_not_shared() -> None:
    names = ("(sliced) pizza", "rose")
    first = [tokenizer().encode(f"({name}")[0] for name in names]
    assert first[0] != first[1]
    template = parse("({class}) {soft:2}", count)
    together = PromptEncoder(model("flat"), tokenizer(), names, template)(random_ctx(2))
    for c, name in enumerate(names):
        alone = PromptEncoder(model("flat"), tokenizer(), [name], template)(random_ctx(2))
        assert relative(alone[0], together[c]) < 1e-5


@pytest.mark.slow
def test_a_repeat_with_shared_ids_gives_the_same_bytes() -> None:
    names = [f"rose {i}" for i in range(60)]
    template = parse("{soft:4#a} {class} {soft:4#a} {soft:4#a}", count)
    encoder = PromptEncoder(model("flat"), tokenizer(), names, template)
    torch.set_num_threads(2)  # where several threads add to one gradient, their order shows
    try:
        runs = [value_and_gradient(encoder, random_ctx(4)) for _ in range(4)]
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


def test_many_prompts_at_once_and_under_vmap() -> None:
    template = parse("a {soft:2#a} {class}, {soft:2#a} {soft:1}", count)
    encoder = PromptEncoder(model("flat"), tokenizer(), NAMES, template)
    ctx = random_ctx(3, 3)
    together = encoder(ctx)
    assert relative(together, torch.stack([encoder(one) for one in ctx])) < 1e-5
    assert relative(torch.func.vmap(encoder)(ctx), together) < 1e-5


@pytest.mark.parametrize(
    ("text", "parts", "starts"),
    [
        (
            "{soft:4} {class}, {soft:2} drawn as an emoji.",
            (range(4), "{class},", range(4, 6), " drawn as an emoji."),
            (),
        ),
        ("  {class}   {soft:8}.  ", ("{class}", range(8), "."), ()),
        ("photo{soft:1}graph {class}", ("photo", range(1), " graph {class}"), ()),
        ("{soft:1} {soft:2}{class}", (range(1), range(1, 3), "{class}"), ()),
        (
            "{soft: a  photo of } {class}{soft:1}",
            (range(3), "{class}", range(3, 4)),
            ((0, "a photo of"),),
        ),
        (
            "{soft:2#a} {soft:red#b_1} {class} {soft:red#b_1} {soft:1}{soft:2#a}",
            (range(2), range(2, 3), "{class}", range(2, 3), range(3, 4), range(2)),
            ((2, "red"),),
        ),
        ("{soft:7 days} {class}", (range(2), "{class}"), ((0, "7 days"),)),
    ],
)
def test_templates_are_read(text: str, parts: tuple[Any, ...], starts: tuple[Any, ...]) -> None:
    assert parse(text, count) == Template(text, parts, starts)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("{soft:4}", r"\{class\} stands there 0 times"),
        ("{soft:4} {class} {class}", r"\{class\} stands there 2 times"),
        ("a photo of a {class}.", "there is nothing to learn"),
        ("{soft} {class}", r"'\{soft\}' is no field"),
        ("{soft:} {class}", r"'\{soft:\}' has neither a number from 1 on nor words"),
        ("{soft:0} {class}", r"'\{soft:0\}' has neither"),
        ("{soft:-1} {class}", r"'\{soft:-1\}' has neither"),
        ("{soft:1.5} {class}", r"'\{soft:1.5\}' has neither"),
        ("{soft:٣} {class}", r"has neither"),
        (f"{{soft:{'9' * 30}}} {{class}}", "has neither"),
        ("{soft:2#} {class}", r"'\{soft:2#\}' is no field"),
        ("{soft:2#a b} {class}", "is no field"),
        ("{soft:2#a} {class} {soft:3#a}", "#a is both '2' and '3'"),
        ("{soft:red#a} {class} {soft:2#a}", "#a is both 'red' and '2'"),
        ("{soft:2} {class} {name}", r"'\{name\}' is no field"),
        ("{soft:2} {class.__init__}", r"'\{class.__init__\}' is no field"),
        ("{soft:2} {class!r}", r"'\{class!r\}' is no field"),
        ("{soft:2} {0}", r"'\{0\}' is no field"),
        ("{soft:2} {}", r"'\{\}' is no field"),
        ("{soft:2} {{class}}", "a brace without its other half in '{'"),
        ("{soft:2 {class}", r"a brace without its other half in '\{soft:2'"),
        ("{soft:2} {class} a}", r"a brace without its other half in 'a\}'"),
    ],
)
def test_anything_else_is_refused(text: str, wrong: str) -> None:
    with pytest.raises(ValueError, match=f"{wrong}.*; a template may have") as raised:
        parse(text, count)
    assert "\n" not in str(raised.value)


def test_a_prompt_that_does_not_fit_names_the_longest_class() -> None:
    template = parse("{soft:20} a {class}, b c d e f g.", count)
    wrong = r'"red red rose" in "\{soft:20\} a \{class\}, .*" takes 34 tokens .* 32: 2 too many'
    with pytest.raises(ValueError, match=wrong):
        PromptEncoder(model("flat"), tokenizer(), ["red rose", "red red rose", "cat"], template)
    # Without a row of so many tokens being built
    with pytest.raises(ValueError, match="too many"):
        PromptEncoder(
            model("flat"), tokenizer(), ["cat"], parse(f"{{soft:{10**15}}}{{class}}", count)
        )


@pytest.mark.parametrize(
    ("n_ctx", "position", "text"),
    [
        (4, "end", "{soft:4} {class}."),
        (5, "middle", "{soft:2} {class} {soft:3}."),
        (1, "middle", "{class} {soft:1}."),
        (4, "front", "{class} {soft:4}."),
    ],
)
def test_coops_prompts_are_templates(n_ctx: int, position: Any, text: str) -> None:
    assert coop(n_ctx, "", position, count) == parse(text, count)
    words = " ".join("abcde"[:n_ctx])
    assert coop(99, words, position, count) == Template(
        text, parse(text, count).parts, ((0, words),)
    )


def test_the_first_vectors_alone() -> None:
    template = parse("{soft:2#a} of {class}, {soft:3}{soft:2#a}{soft:1}", count)
    assert template.first(3).parts == (range(2), "of {class},", range(2, 3), range(2))
    assert template.first(1).parts == (range(1), "of {class},", range(1))
    assert (template.n_ctx, template.first(3).n_ctx, template.first(6)) == (6, 3, template)


def test_the_sentence_with_words_for_vectors() -> None:
    template = parse("{soft:a red photo} of{soft:2}{class}s, {soft:1}.", count)
    assert template.plain("X") == "a red photo of X X {}s, X."
