"""FedDDA: a prompt of two contexts, a gated mixture on raw features, what travels."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from pfedmoap_flwr.clip.words import encode_text
from pfedmoap_flwr.errors import UsageError
from support.federation import Exchange, Federate, make_method
from support.tiny import CLASSNAMES, NUM_CLIENTS

SHARED = {"ctx", "common.down.weight", "common.up.weight"}
PERSONAL = {"local", "specific.down.weight", "specific.up.weight", "gate.weight"}


def test_the_class_name_and_the_style_stand_between_the_contexts() -> None:
    method: Any = make_method("feddda", **{"prompt.ctx-init": "a photo of one"})
    head = method.build()
    assert head.ctx.shape == head.local.shape == (2, 32)
    # With words in the contexts' places it is the sentence, by CLIP's own encoder
    sentences = [f"a photo {n.replace('_', ' ')} with a style of of one." for n in CLASSNAMES]
    expected = encode_text(method.clip.model, method.clip.tokenizer, sentences)
    torch.testing.assert_close(head.encode().detach(), expected, rtol=1e-4, atol=1e-5)


def test_the_contexts_share_the_prompts_tokens() -> None:
    for n_ctx, ctx, local in ((4, 2, 2), (5, 2, 3)):
        head: Any = make_method("feddda", **{"prompt.n-ctx": n_ctx}).build()
        assert (len(head.ctx), len(head.local)) == (ctx, local)
        plain: Any = make_method("promptfl", **{"prompt.n-ctx": n_ctx}).build()
        assert torch.equal(torch.cat([head.ctx, head.local]), plain.ctx)


def test_16_the_image_feature_is_a_gated_mixture_by_hand() -> None:
    head: Any = make_method("feddda").build().double()
    generator = torch.Generator().manual_seed(0)
    images = 3 * torch.randn(4, 64, generator=generator).double()
    text = F.normalize(torch.randn(4, 64, generator=generator), dim=-1).double()
    logits = head.classify(images, text)
    for i, x in enumerate(images):
        outputs = [x]
        for adapter in (head.specific, head.common):
            inner = (adapter.down.weight @ x).clamp(min=0)
            assert inner.shape == (16,)
            outputs.append((adapter.up.weight @ inner).clamp(min=0))
        scores = (head.gate.weight @ x).exp()
        mixed = sum(s * o for s, o in zip(scores / scores.sum(), outputs, strict=True))
        expected = head.logit_scale * (text @ mixed) / mixed.norm()
        torch.testing.assert_close(logits[i], expected)
    # Gate and adapters see the length of a feature: unit-norm ones would be told apart otherwise
    unit = head.classify(F.normalize(images, dim=-1), text)
    assert (unit - logits).abs().max() > 1e-2


def test_every_part_is_trained() -> None:
    method: Any = make_method("feddda")
    head = method.build()
    loss = method.loss(head, torch.randn(8, 64), torch.arange(8) % 4, {})
    loss.backward()
    moved = {name for name, p in head.named_parameters() if p.grad.abs().max() > 0}
    assert moved == SHARED | PERSONAL


def test_the_shared_halves_travel_and_the_local_ones_stay(
    federate: Federate, wire: list[Exchange]
) -> None:
    run = federate(method="feddda", num_server_rounds=1)
    assert len(wire) == 3 * NUM_CLIENTS
    assert all(exchange.down.keys() == SHARED for exchange in wire)
    assert all(exchange.up.keys() == SHARED for exchange in wire if exchange.kind == "train")
    start = dict(make_method("feddda").build().named_parameters())
    heads = [load_file(path) for path in sorted(run.path.rglob("round-00001.safetensors"))]
    assert len(heads) == NUM_CLIENTS
    for name in SHARED | PERSONAL:
        assert all((head[name] - start[name]).abs().max() > 1e-7 for head in heads), name
        assert (heads[0][name] - heads[1][name]).abs().max() > 1e-7, name


def test_a_prompt_that_cannot_be_divided_is_refused() -> None:
    with pytest.raises(UsageError, match=r"prompt.n-ctx=1: feddda divides it"):
        make_method("feddda", **{"prompt.n-ctx": 1}).build()
