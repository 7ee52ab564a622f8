"""The frozen text tower g(.) as a function of a prompt's context (arXiv 2410.10114, Eq. 3).

A prompt is P^(c) = [SOS, v_1 .. v_M, name of class c, ".", EOT], or in the order that a `Template`
says; the v are learned, the rest is embedded text.

Vectors can enter deeper layers too (deep prompts: Jia et al., ECCV 2022, arXiv 2203.12119; for the
text tower MaPLe, arXiv 2210.03117): there they take the place of what the layer before made of the
context tokens. They follow those of the input in one context.

Shapes: P prompts, C classes, M context tokens, D text width, d embedding width, L the tower's
full length (77 for CLIP). With depth > 1 a context has M = depth times the template's tokens.
"""

import threading
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pfedmoap_flwr.clip import prefix
from pfedmoap_flwr.clip.template import Template
from pfedmoap_flwr.clip.words import Tokenizer, Words, embed_words


class PromptEncoder:
    """g(P): learned contexts in, L2-normalised text features of all classes out.

    Args:
        model: an open_clip model, on its device already; it is read, never changed.
        tokenizer: the model's own, from `open_clip.get_tokenizer`.
        classnames: C names; underscores become spaces.
        template: where the M context vectors, the name and plain words stand.
        class_specific: one context per class instead of one for all.
        depth: how many layers context tokens enter anew; 1: the input alone.
        precision: of the tower's products; features are float32 all the same.

    Raises:
        ValueError: an impossible setting, a name too long for the tower, or a tower that cannot
            be given embeddings in place of words.

    Attributes:
        n_ctx: M. width: D. embed_dim: d.
        fallback: None for towers that are causal and pool at EOT, whose prompts are encoded
            without computing any shared token twice (see `prefix`). For all others the reason why
            prompts pass at full length through open_clip's own forward.

    Either way is checked against the model's own `encode_text` when the encoder is built.

    Without gradients, features are remembered by the prompt's bytes, up to `memory` bytes of them:
    an expert that many clients of a process borrow is encoded once.
    """

    memory = 256 * 2**20

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        classnames: Sequence[str],
        template: Template,
        *,
        class_specific: bool = False,
        depth: int = 1,
        precision: torch.dtype = torch.float32,
    ) -> None:
        self.classnames = tuple(name.replace("_", " ") for name in classnames)
        if not self.classnames or not all(name.strip() for name in self.classnames):
            raise ValueError(f"classnames must be at least one name, and none empty: {classnames}")
        self.template = template
        self.n_ctx = depth * template.n_ctx
        self.class_specific = class_specific
        self._precision = precision

        self._words = words = Words(model, tokenizer)
        self.width: int = words.embedding.weight.shape[1]
        rows, self._ends = self._lay_out()
        # Which vector stands at each place of one
        self._places = [j for part in template.soft for j in part]
        self._shared = self._count_shared(rows)
        self._rows = torch.tensor([row + [words.pad] * (words.length - len(row)) for row in rows])

        self.fallback = prefix.why_not(words.text)
        pooled = prefix.pooled(words.text, self._ids(words.filler))
        if self.fallback is None and pooled.tolist() != [end - 1 for end in self._ends]:
            self.fallback = "it does not pool at the last token of every prompt"
        self.embed_dim = self._checked_embed_dim()
        if depth > 1:
            self._check_depth(depth)
        self._all = self._prompts(range(len(self.classnames)))
        self._remembered: OrderedDict[bytes, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, ctx: Tensor) -> Tensor:
        """Text features (..., C, d) of contexts (..., M, D), or (..., C, M, D) if class-specific.

        Leading dimensions are several prompts, encoded together. Differentiable in `ctx`.
        """
        shape: tuple[int, ...] = (self.n_ctx, self.width)
        if self.class_specific:
            shape = (len(self.classnames), *shape)
        lead = ctx.shape[: -len(shape)]
        if ctx.shape != (*lead, *shape):
            raise ValueError(
                f"ctx has shape {tuple(ctx.shape)}; its last dimensions must be {shape}"
            )
        if not ctx.numel():  # no prompts at all, as with a pool of no others
            return ctx.new_zeros(*lead, len(self.classnames), self.embed_dim)
        prompts = ctx.reshape(-1, *shape)
        if torch.is_grad_enabled():
            features = F.normalize(self._encode(prompts, self._all), dim=-1)
        else:
            with self._lock:
                features = torch.stack([self._remember(prompt) for prompt in prompts])
        return features.reshape(*lead, *features.shape[1:])

    def _remember(self, prompt: Tensor) -> Tensor:
        """Features (C, d) of one prompt, from memory where they were computed before."""
        # One by one: the bits of a product may depend on how many rows it has. Remembered features
        # must not depend on which other prompts were encoded with them.
        key = prompt.contiguous().view(torch.uint8).cpu().numpy().tobytes()
        features = self._remembered.pop(key, None)
        if features is None:
            features = F.normalize(self._encode(prompt[None], self._all)[0], dim=-1)
        self._remembered[key] = features
        while len(self._remembered) * features.nbytes > max(self.memory, features.nbytes):
            self._remembered.popitem(last=False)
        return features

    def embed(self, words: str) -> Tensor:
        """Token embeddings (n, D) of plain words, without SOS and EOT: CoOp's `ctx_init`."""
        return embed_words(self._words.model, self._words.tokenizer, words)

    def _check_depth(self, depth: int) -> None:
        if self.fallback is not None:
            raise ValueError(f"vectors cannot enter its deeper layers: {self.fallback}")
        layers = len(self._words.text.transformer.resblocks)
        if depth > layers:
            raise ValueError(f"vectors in {depth} layers; the text tower has {layers}")

    def _lay_out(self) -> tuple[list[list[int]], list[int]]:
        """Token ids of all prompts, with i - I for place i of I of vectors; and their lengths."""
        words, soft, n_places = self._words, self.template.soft, sum(map(len, self.template.soft))
        filled = [self.template.fill(name) for name in self.classnames]
        contents = words.content([sentence for sentence, _ in filled])
        befores = [before for _, before in filled]
        # CoOp's split: as many tokens as the words before have alone, even if "." merges with them.
        marks = [words.content(texts) for texts in zip(*befores, strict=True)]
        ends = [len(words.head) + len(c) + n_places + len(words.tail) for c in contents]
        longest = max(range(len(ends)), key=lambda c: ends[c])
        what = f'the class name "{self.classnames[longest]}" in "{self.template.text}"'
        words.check_fits(what, ends[longest], "shorten the name or the prompt")
        rows = []
        for c, content in enumerate(contents):
            body, done, place = [], 0, -n_places
            for vectors, mark in zip(soft, marks, strict=True):
                body += [*content[done : len(mark[c])], *range(place, place + len(vectors))]
                done, place = max(done, len(mark[c])), place + len(vectors)
            rows.append([*words.head, *body, *content[done:], *words.tail])
        return rows, ends

    def _count_shared(self, rows: list[list[int]]) -> int:
        """S, how many tokens before the class's name are the same in all prompts."""
        plain, vectors = self.template.up_to_class()
        limit = len(self._words.head) + len(self._words.content([plain])[0]) + vectors
        for place, tokens in enumerate(zip(*rows, strict=False)):
            own = self.class_specific and tokens[0] < 0
            if place == limit or own or len(set(tokens)) > 1:
                return place
        return limit

    def _ids(self, word: int) -> Tensor:
        """Token ids (C, L) of all prompts, with this word's in place of every context token."""
        return self._rows.where(self._rows >= 0, word)

    def _prompts(self, classes: Sequence[int]) -> "_Prompts":
        """The prompts of some classes, ready to be filled in with a context."""
        chosen = torch.tensor(classes)
        rows, ids = self._rows[chosen], self._ids(self._words.filler)[chosen]
        fixed, index = torch.unique(ids, return_inverse=True)
        ctx = len(fixed) + len(self._places) * (chosen[:, None] + 1) + rows
        packing = None
        if self.fallback is None:
            packing = prefix.pack([self._ends[c] for c in classes], self._shared, self.width)
            packing = packing.to(self._words.device)
        on = self._words.device
        return _Prompts(ids.to(on), fixed.to(on), index.where(rows >= 0, ctx).to(on), packing)

    def _encode(self, ctx: Tensor, prompts: "_Prompts") -> Tensor:
        """Features (P, C, d), not normalised, from contexts (P, M, D) or (P, all classes, M, D)."""
        low = self._precision != torch.float32
        with torch.autocast(ctx.device.type, self._precision if low else None, enabled=low):
            features = self._encode_as_it_is(ctx, prompts)
        return features.float() if low else features

    def _encode_as_it_is(self, ctx: Tensor, prompts: "_Prompts") -> Tensor:
        words, n_prompts = self._words, len(ctx)
        first, *deeper = (
            self._table(own, prompts) for own in ctx.split(self.template.n_ctx, dim=-2)
        )
        packing = prompts.packing
        if packing is None:
            rows = first[:, prompts.index].flatten(0, 1)
            features = words.encode(prompts.ids.repeat(n_prompts, 1), rows)
            return features.reshape(n_prompts, -1, features.shape[-1])
        shared = prompts.index[0, : self._shared]
        rest = prompts.index[packing.classes, packing.places]
        tokens = torch.cat([shared, rest.flatten()])
        soft, deep = tokens >= len(prompts.fixed), [table[:, tokens] for table in deeper]
        return prefix.encode(words.text, first[:, shared], first[:, rest], packing, soft, deep)

    def _table(self, ctx: Tensor, prompts: "_Prompts") -> Tensor:
        """Embeddings (P, U + C I, D): words, then the context at its I places in each class."""
        if self._places != list(range(self.template.n_ctx)):
            vectors = ctx.unbind(-2)
            ctx = torch.stack([vectors[j] for j in self._places], dim=-2)
        if not self.class_specific:
            # A copy for each class: if many tokens read one row, threads would add up its gradient
            # in any order, and a repeated run would not give the same bytes.
            ctx = ctx[:, None].expand(-1, len(self.classnames), -1, -1)
        fixed = self._words.embed(prompts.fixed).expand(len(ctx), -1, -1)
        return torch.cat([fixed, ctx.flatten(1, 2)], dim=1)

    @torch.no_grad()
    def _checked_embed_dim(self) -> int:
        """d, once features of plain words as context agree with the model's own `encode_text`."""
        words = self._words
        by_length = sorted(range(len(self._ends)), key=lambda c: self._ends[c])
        classes = sorted({by_length[0], by_length[-1]})
        # Another word than the filler, so that a tower which ignored the context is found out.
        word = words.content(["photo"])[0][0]
        expected = F.normalize(words.encode(self._ids(word)[classes]), dim=-1)
        size = (1, len(self.classnames)) if self.class_specific else (1,)
        ctx = words.embed(torch.full((*size, self.template.n_ctx), word))
        # Rounding differs with the order of summation; a wrong mask, position or projection turns
        # a feature by far more than this.
        low = max(torch.finfo(expected.dtype).eps, torch.finfo(self._precision).eps) > 1e-6
        limit = 0.1 if low else 0.01

        def agree() -> bool:
            features = F.normalize(self._encode(ctx, self._prompts(classes))[0], dim=-1)
            if features.shape != expected.shape:
                return False
            return bool(((features - expected).norm(dim=-1) < limit).all())

        if self.fallback is None and not agree():
            self.fallback = "its features differ from those that open_clip computes"
            warnings.warn(
                f"text tower {words.tower}: {self.fallback}; prompts now pass through open_clip's "
                "own forward at full length, which is slower",
                stacklevel=3,
            )
        if self.fallback is not None and not agree():
            raise ValueError(
                f"prompts cannot be learned for the text tower {words.tower}: given the "
                "embeddings of words, it does not give the features of these words"
            )
        return expected.shape[-1]


@dataclass(frozen=True)
class _Prompts:
    """Prompts of some classes, whose tokens are rows of a table: U words, then all contexts."""

    ids: Tensor  # (C, L) token ids, with a filler for the context
    fixed: Tensor  # (U,) the distinct ids among them
    index: Tensor  # (C, L) rows of the table
    packing: prefix.Packing | None
