"""The gate and the head of pFedMoAP against PyTorch's attention and the paper's equations in NumPy.

Shapes: B batch, C classes, M context tokens, d embedding width, D gating width, K experts.
"""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from pfedmoap_flwr.methods.base import Method, Split
from pfedmoap_flwr.methods.parts.gate import AttentionGate
from pfedmoap_flwr.methods.pfedmoap import PFedMoAPHead
from pfedmoap_flwr.randomness import torch_generator
from pfedmoap_flwr.training import local
from support.federation import make_method, make_work

Array = NDArray[np.float64]

SIZES = [(1, 1, 0), (1, 4, 2), (5, 1, 3), (6, 3, 0), (3, 7, 9)]
sizes = pytest.mark.parametrize(("b", "c", "k"), SIZES)


# The paper, written down again


def unit(x: Array) -> Array:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max())
    return e / e.sum()


def weights_of(gate: nn.Module) -> dict[str, Array]:
    return {name: tensor.double().numpy() for name, tensor in gate.state_dict().items()}


def attention(
    weights: dict[str, Array], images: Array, texts: Array, heads: int, scale: float
) -> Array:
    """Eq. 11, one image, one class, one head at a time: (B, D), (K+1, C, D) -> (B, C, D)."""
    query = images @ weights["query.weight"].T + weights["query.bias"]
    key = texts @ weights["key.weight"].T + weights["key.bias"]
    value = texts @ weights["value.weight"].T + weights["value.bias"]
    d_head = images.shape[1] // heads
    out = np.zeros((len(images), texts.shape[1], images.shape[1]))
    for b in range(len(images)):
        for c in range(texts.shape[1]):
            for head in range(heads):
                part = slice(head * d_head, (head + 1) * d_head)
                share = softmax(scale * (key[:, c, part] @ query[b, part]))
                out[b, c, part] = share @ value[:, c, part]
    return out @ weights["out.weight"].T + weights["out.bias"]


def pooled(x: Array, width: int, compat: str) -> Array:
    """Average of neighbours, then unit length; the released code takes every n-th entry as is."""
    n = x.shape[-1] // width
    if compat == "released":
        return x[..., ::n]
    return unit(np.stack([x[..., i * n : (i + 1) * n].mean(-1) for i in range(width)], axis=-1))


def logits_of(
    head: PFedMoAPHead, images: Array, local: Array, experts: Array, compat: str, lambda_: float
) -> Array:
    """Eq. 8 to 10, over tau, from text features: images (B, d), local (C, d), experts (K, C, d)."""
    assert head.gate is not None
    texts = np.concatenate([local[None], experts])
    width, heads = 32, 4
    scale = 10.0 if compat == "released" else 1 / np.sqrt(width / heads)
    query = pooled(images, width, compat)
    moe = attention(
        weights_of(head.gate), query, pooled(texts, width, compat), heads=heads, scale=scale
    )
    if compat == "paper":
        moe = unit(moe)
    out = np.zeros((len(images), len(local)))
    for b in range(len(images)):
        for c in range(len(local)):
            out[b, c] = query[b] @ moe[b, c] + lambda_ * (images[b] @ local[c])
    return head.logit_scale * out


# The gate


def random_inputs(b: int, c: int, k: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(b + 10 * c + 100 * k)
    shapes = (b, width), (k + 1, c, width)
    images, texts = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return images.requires_grad_(), texts.requires_grad_()


def made_gate(width: int, heads: int, score_scale: float | None = None) -> AttentionGate:
    return AttentionGate(width, heads, torch_generator(0), score_scale).double()


def torch_twin(gate: AttentionGate, width: int, heads: int) -> nn.MultiheadAttention:
    twin = nn.MultiheadAttention(width, heads, batch_first=True, dtype=torch.float64)
    parts = (gate.query, gate.key, gate.value)
    with torch.no_grad():
        twin.in_proj_weight.copy_(torch.cat([p.weight for p in parts]))
        twin.in_proj_bias.copy_(torch.cat([p.bias for p in parts]))
        twin.out_proj.weight.copy_(gate.out.weight)
        twin.out_proj.bias.copy_(gate.out.bias)
    return twin


@sizes
@pytest.mark.parametrize(("width", "heads"), [(32, 4), (128, 8), (8, 8), (8, 1)])
def test_gate_is_pytorchs_multi_head_attention(
    b: int, c: int, k: int, width: int, heads: int
) -> None:
    gate = made_gate(width, heads)
    twin = torch_twin(gate, width, heads)
    images, texts = random_inputs(b, c, k, width)
    ours = gate(images, texts)
    keys = texts.transpose(0, 1)  # each class is a sequence of K+1 experts
    theirs, _ = twin(images.expand(c, -1, -1), keys, keys, need_weights=False)
    theirs = theirs.transpose(0, 1)
    torch.testing.assert_close(ours, theirs)

    weighting = torch.linspace(-1, 1, ours.numel(), dtype=torch.float64).view_as(ours)
    inputs = [images, texts]
    our_parameters = [gate.query, gate.key, gate.value, gate.out]
    ours_by = [*inputs, *(p for layer in our_parameters for p in (layer.weight, layer.bias))]
    theirs_by = [*inputs, *twin.parameters()]
    our_gradients = torch.autograd.grad((ours * weighting).sum(), ours_by)
    image, text, in_weight, in_bias, out_weight, out_bias = torch.autograd.grad(
        (theirs * weighting).sum(), theirs_by
    )
    qkv = zip(in_weight.chunk(3), in_bias.chunk(3), strict=True)
    expected = [image, text, *(t for pair in qkv for t in pair), out_weight, out_bias]
    torch.testing.assert_close(list(our_gradients), expected)
    assert all(gradient.abs().max() > 1e-6 for gradient in (image, out_weight) if k)


@sizes
@pytest.mark.parametrize("score_scale", [None, 10.0])
def test_gate_is_equation_11(b: int, c: int, k: int, score_scale: float | None) -> None:
    gate = made_gate(32, 4, score_scale)
    images, texts = random_inputs(b, c, k, 32)
    scale = 1 / np.sqrt(8) if score_scale is None else score_scale
    expected = attention(
        weights_of(gate), images.detach().numpy(), texts.detach().numpy(), heads=4, scale=scale
    )
    np.testing.assert_allclose(gate(images, texts).detach().numpy(), expected, rtol=1e-10)


def test_the_scale_of_scores_matters() -> None:
    images, texts = random_inputs(3, 2, 4, 32)
    assert (made_gate(32, 4)(images, texts) - made_gate(32, 4, 10.0)(images, texts)).norm() > 0.1


@sizes
@pytest.mark.parametrize("score_scale", [None, 10.0])
def test_the_order_of_experts_is_irrelevant(
    b: int, c: int, k: int, score_scale: float | None
) -> None:
    gate = made_gate(32, 4, score_scale)
    images, texts = random_inputs(b, c, k, 32)
    order = torch.randperm(k + 1, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(gate(images, texts[order]), gate(images, texts))
    if k:
        assert not torch.allclose(gate(images, texts[:-1]), gate(images, texts))


@pytest.mark.parametrize(
    ("width", "expected"), [(128, 66_048), (32, 4_224), (64, 16_640), (256, 263_168)]
)
def test_number_of_parameters_is_the_papers(width: int, expected: int) -> None:
    gate = AttentionGate(width, 8, torch_generator(0))
    assert sum(p.numel() for p in gate.parameters()) == expected


# The head


def made_head(experts: Tensor | None = None, **changes: Any) -> PFedMoAPHead:
    """A fresh head; with experts, as it is after their delivery."""
    method = make_method("pfedmoap", **changes)
    return delivered(method, method.build(), experts)


def delivered(method: Method[Any, Any], head: PFedMoAPHead, experts: Tensor | None) -> PFedMoAPHead:
    received = {} if experts is None else {"experts": experts}
    head.load(received)
    make_work(method, head, received=received)
    return head


def random_prompts(k: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(k)
    return torch.empty(k, *(shape or (4, 32))).normal_(std=0.02, generator=generator)


def random_images(b: int) -> Tensor:
    return F.normalize(torch.randn(b, 64, generator=torch.Generator().manual_seed(b)), dim=-1)


def as_double(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy()


@pytest.mark.parametrize("compat", ["paper", "released"])
@pytest.mark.parametrize("lambda_", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("k", [0, 1, 5])
@pytest.mark.parametrize("class_specific", [False, True])
def test_logits_are_equations_8_to_10(
    compat: str, lambda_: float, k: int, class_specific: bool
) -> None:
    prompts = random_prompts(k, 4, 4, 32) if class_specific else random_prompts(k)
    changes = {
        "compat": compat,
        "pfedmoap.lambda": lambda_,
        "prompt.class-specific": class_specific,
    }
    head, images = made_head(prompts, **changes), random_images(6)
    local = as_double(head.encoder(head.ctx))
    experts = np.stack([as_double(head.encoder(p)) for p in prompts]) if k else local[None][:0]
    expected = logits_of(head, as_double(images), local, experts, compat, lambda_)
    np.testing.assert_allclose(as_double(head(images)), expected, rtol=1e-4, atol=1e-4)
    other = logits_of(head, as_double(images), local, experts, compat, lambda_ + 0.1)
    assert np.abs(other - expected).max() > 0.1


def test_compat_decides_the_logits() -> None:
    logits = []
    for compat in ("paper", "released"):
        head = made_head(random_prompts(3), compat=compat)
        logits.append(head(random_images(6)))
    assert (logits[0] - logits[1]).abs().max() > 0.1


@pytest.mark.parametrize("compat", ["paper", "released"])
@pytest.mark.parametrize("lambda_", [0.0, 0.5])
def test_without_experts_logits_are_equation_3(compat: str, lambda_: float) -> None:
    changes: dict[str, Any] = {"compat": compat, "pfedmoap.lambda": lambda_}
    head = made_head(**changes)
    images = random_images(6)
    expected = head.logit_scale * as_double(images) @ as_double(head.encoder(head.ctx)).T
    np.testing.assert_allclose(as_double(head(images)), expected, rtol=1e-4, atol=1e-5)
    with_experts = made_head(random_prompts(2), **changes)
    assert np.abs(as_double(with_experts(images)) - expected).max() > 0.1


def test_without_gate_experts_have_no_say() -> None:
    neutral: dict[str, Any] = {"pfedmoap.gate": "none", "pfedmoap.lambda": 0.5}
    head = made_head(**neutral)
    assert [name for name, _ in head.named_parameters()] == ["ctx"]
    plain = head(random_images(4))
    with_experts = made_head(random_prompts(2), **neutral)
    torch.testing.assert_close(with_experts(random_images(4)), 0.5 * plain)


def test_experts_that_were_never_encoded_are_an_error() -> None:
    head = made_head()
    head.load({"experts": random_prompts(2)})
    with pytest.raises(RuntimeError, match="prepare"):
        head(random_images(2))


@pytest.mark.parametrize("compat", ["paper", "released"])
def test_prompt_and_gate_learn_and_nothing_else(compat: str) -> None:
    head = made_head(random_prompts(3), compat=compat)
    F.cross_entropy(head(random_images(6)), torch.tensor([0, 1, 2, 3, 0, 1])).backward()
    assert {name for name, _ in head.named_parameters()} == {
        "ctx",
        *(f"gate.{layer}.{part}" for layer in ("query", "key", "value", "out")
          for part in ("weight", "bias")),
    }  # fmt: skip
    # What shifts all scores alike, or all logits where T_MoE is not normalised, softmax cannot see
    unseen = {"gate.key.bias"}
    unseen |= {"gate.value.bias", "gate.out.bias"} if compat == "released" else set()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad.abs().max() > 1e-5) == (name not in unseen), name
    assert head.experts is not None
    assert not head.experts.requires_grad
    assert head.experts.grad is None
    model = make_method("pfedmoap").clip.model
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_a_plain_prompt_leaves_the_gate_alone() -> None:
    head = made_head()
    F.cross_entropy(head(random_images(4)), torch.arange(4)).backward()
    assert head.ctx.grad is not None
    assert head.gate is not None
    assert all(p.grad is None for p in head.gate.parameters())


class CountingEncoder:
    """The text encoder, with a list of the shapes it was asked to encode."""

    def __init__(self, encoder: Any) -> None:
        self.encoder = encoder
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, ctx: Tensor) -> Tensor:
        self.shapes.append(tuple(ctx.shape))
        return self.encoder(ctx)


def test_experts_are_encoded_once_for_each_delivery() -> None:
    method = make_method("pfedmoap", local_epochs=3, batch_size=4)
    head = method.build()
    counting: Any = CountingEncoder(head.encoder)
    head.encoder = counting
    data = Split(random_images(8), torch.arange(8) % 4)
    own, borrowed = (4, 32), (2, 4, 32)
    for delivery in range(2):
        counting.shapes.clear()
        prompts = random_prompts(2) * (delivery + 1)
        head.load({"experts": prompts})
        local.train(method, [make_work(method, head, data, {"experts": prompts})])
        local.accuracies(head, {"all": data})
        # 3 epochs of 2 steps, and an evaluation
        assert counting.shapes.count(own) == 7
        assert counting.shapes.count(borrowed) == 1
        fresh = method.build()
        fresh.load(head.state())
        torch.testing.assert_close(
            head(data.features), delivered(method, fresh, prompts)(data.features)
        )
