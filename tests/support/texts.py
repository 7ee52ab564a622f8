"""Small text towers of every kind, prompts put together as CoOp does, and the plain forward."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pfedmoap_flwr.clip.settings import Position
from pfedmoap_flwr.clip.template import Template, coop

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


def layout(n_ctx: int, position: Position = "end") -> Template:
    """CoOp's template."""
    return coop(n_ctx, "", position, len)


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
    return full_length(clip, *coop_prompts(clip, ctx, names, position, tokens))


def full_length(clip: nn.Module, ids: Tensor, x: Tensor) -> Tensor:
    """Features (C, d) of embeddings (C, L, D) in the places of ids (C, L)."""
    text: Any = getattr(clip, "text", clip)
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
