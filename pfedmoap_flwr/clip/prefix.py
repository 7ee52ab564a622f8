"""A causal text tower that reads what many prompts share only once.

In CLIP's text tower a token sees itself and the tokens before it, nothing else. So tokens that all
prompts begin with have the same keys and values in each of them, layer by layer, and what follows
the pooled token cannot reach it. Encoding the common prefix once, and every suffix only up to its
pooled token, is exact. Without it, a prompt of 16 context tokens and 100 class names costs 7,700
tokens (100 sequences padded to 77); with it, about 500.

Shapes: P prompts, C classes, S prefix tokens, R rows of W packed suffix tokens, H heads, D text
width, d embedding width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, TextTransformer, Transformer
from torch import Tensor, nn


def why_not(text: Any) -> str | None:
    """None if `encode` computes what this text tower computes, else what stands in the way.

    `text` is whatever holds open_clip's text modules: a flat `CLIP`, or the `TextTransformer` of a
    `CustomTextCLIP`.
    """
    transformer: Any = getattr(text, "transformer", None)
    if type(transformer) is not Transformer or not hasattr(text, "ln_final"):
        return "it is not built from open_clip's own transformer"
    if getattr(text, "cls_emb", None) is not None:
        return "it appends a class token after the text"
    mask = getattr(text, "attn_mask", None)
    if mask is None or not torch.equal(mask, torch.full_like(mask, -torch.inf).triu(1)):
        return "its attention is not causal"
    if isinstance(text, TextTransformer) and text.use_pad_mask:
        return "it masks padding"
    for block in transformer.resblocks:
        if type(block) is not ResidualAttentionBlock or hasattr(block, "ln_1_kv"):
            return f"it has blocks of another kind ({type(block).__name__})"
        attn = block.attn
        if type(attn) is not nn.MultiheadAttention:
            return f"it has attention of another kind ({type(attn).__name__})"
        if attn.in_proj_weight is None or attn.bias_k is not None or attn.add_zero_attn:
            return "its attention has extra parts"
        if attn.dropout:
            return "its attention has dropout"
    return None


def pooled(text: Any, ids: Tensor) -> Tensor:
    """Where in each row of token ids (C, L) this text tower pools (C,); -1 if not by the ids."""
    at = torch.full_like(ids[:, 0], -1)
    pool = getattr(text, "pool_type", getattr(text, "text_pool_type", "argmax"))
    if pool == "argmax":
        at = ids.argmax(dim=-1)
    elif pool == "eos":
        eos: int = getattr(text, "eos_id", getattr(text, "text_eos_id", -1))
        at = ids.eq(eos).int().argmax(dim=-1)
    return at


@dataclass(frozen=True)
class Packing:
    """Suffixes side by side in R rows of W places, so that little is left empty.

    Rows of one size make attention one product, and a token meets only the few others in its row.
    """

    classes: Tensor  # (R, W) whose token this is
    places: Tensor  # (R, W) where in its prompt it stands
    own: Tensor  # (R, W, W) which tokens of its row a token sees: its class's, up to itself
    ends: Tensor  # (C,) where each class's last token is, counted through the rows

    def to(self, device: torch.device) -> "Packing":
        return Packing(*(getattr(self, field.name).to(device) for field in fields(self)))


def pack(ends: Sequence[int], size: int, width: int) -> Packing:
    """Pack the tokens from `size` (S) on of prompts that end after `ends` (C) tokens."""
    order = sorted(range(len(ends)), key=lambda c: ends[c])
    lengths = [ends[c] - size for c in order]
    longest = lengths[-1]

    def fill(places: int) -> list[list[int]]:
        rows: list[list[int]] = []
        room = 0
        for c, length in zip(order, lengths, strict=True):
            if length > room:
                rows.append([])
                room = places
            rows[-1].append(c)
            room -= length
        return rows

    def cost(places: int) -> int:  # of one layer, in multiplications by D: linear maps + attention
        return len(fill(places)) * places * (12 * width + 2 * (size + places))

    w = min(range(longest, max(longest, min(sum(lengths), 128)) + 1), key=cost)
    rows = fill(w)
    classes, places = torch.zeros(2, len(rows), w, dtype=torch.long)
    owner = torch.full((len(rows), w), -1)
    at = torch.zeros(len(ends), dtype=torch.long)
    for r, row in enumerate(rows):
        start = 0
        for c in row:
            stop = start + ends[c] - size
            classes[r, start:stop] = owner[r, start:stop] = c
            places[r, start:stop] = torch.arange(size, ends[c])
            at[c] = r * w + stop - 1
            start = stop
    own = (owner[:, :, None] == owner[:, None, :]).tril()
    return Packing(classes, places, own, at)


def encode(
    text: Any,
    prefix: Tensor,
    suffix: Tensor,
    packing: Packing,
    soft: Tensor,
    deep: Sequence[Tensor] = (),
) -> Tensor:
    """Features (P, C, d) at the last token of each prompt, not normalised.

    `prefix` (P, S, D) are the embeddings that all prompts begin with, `suffix` (P, R, W, D) those
    of the rest, as packed. The first of `deep`, (P, S + R W, D) each, takes the place of what
    enters the second block, the next of what enters the third, at the tokens `soft` (S + R W,).
    """
    dtype, size = text.transformer.get_cast_dtype(), prefix.shape[1]
    position = text.positional_embedding.to(dtype)
    prefix = prefix.to(dtype) + position[:size]
    suffix = suffix.to(dtype) + position[packing.places]
    x = torch.cat([prefix, suffix.flatten(1, 2)], dim=1)
    *blocks, last = text.transformer.resblocks
    for i, block in enumerate(blocks):
        x = _block(block, x, size, packing)
        if i < len(deep):
            x = torch.where(soft[:, None], deep[i].to(x.dtype), x)
    # Of the last block only the tokens that are pooled are wanted.
    x = text.ln_final(_block(last, x, size, packing, size + packing.ends))
    if isinstance(text.text_projection, nn.Linear):
        return cast(Tensor, text.text_projection(x))
    return x if text.text_projection is None else cast(Tensor, x @ text.text_projection)


def _block(
    block: Any, x: Tensor, size: int, packing: Packing, keep: Tensor | slice = slice(None)
) -> Tensor:
    """One residual block over the prefix and the packed tokens (P, S + R W, D)."""
    attn = block.attn
    qkv = F.linear(block.ln_1(x), attn.in_proj_weight, attn.in_proj_bias)
    prefix, suffix = (
        # A copy whose heads come first, made once, so that products need none of their own
        part.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).contiguous()
        for part in qkv.split([size, x.shape[1] - size], dim=1)
    )
    mixed = _attend(prefix, suffix, packing.own).transpose(1, 2).flatten(2)
    x = x[:, keep] + block.ls_1(attn.out_proj(mixed[:, keep]))
    return cast(Tensor, x + block.ls_2(block.mlp(block.ln_2(x))))


def _attend(prefix: Tensor, suffix: Tensor, own: Tensor) -> Tensor:
    """Attention (P, H, S + R W, D / H) from queries, keys and values of prefix and packed tokens.

    `prefix` (3, P, H, S, D / H), `suffix` (3, P, H, R W, D / H). A packed token's keys are those of
    the prefix and of its class: two products, so that no row holds a copy of the prefix.
    """
    (q0, k0, v0), (q, k, v) = prefix.unbind(), suffix.unbind()

    def rows(tokens: Tensor) -> Tensor:
        return tokens.unflatten(2, own.shape[:2])

    causal = own.new_ones(q0.shape[2], q0.shape[2]).tril()
    first = _weights((q0 @ k0.mT).masked_fill(~causal, -torch.inf), q) @ v0
    among = (rows(q) @ rows(k).mT).masked_fill(~own, -torch.inf).flatten(2, 3)
    weights = _weights(torch.cat([q @ k0.mT, among], dim=-1), q)
    of_prefix, of_own = weights.split([k0.shape[2], own.shape[2]], dim=-1)
    rest = of_prefix @ v0 + (rows(of_own) @ rows(v)).flatten(2, 3)
    return torch.cat([first, rest], dim=2)


def _weights(products: Tensor, q: Tensor) -> Tensor:
    # Written out because the backward of fused kernels may add up in any order on a GPU, and a
    # repeated run must give the same bytes. At these sizes it is no slower.
    exact = torch.promote_types(q.dtype, torch.float32)
    return (products * q.shape[-1] ** -0.5).softmax(dim=-1, dtype=exact).to(q.dtype)
