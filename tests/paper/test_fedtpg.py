"""FedTPG: the generator against numbers of its public code, and what its prompt depends on."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.base import Split, Upload
from pfedmoap_flwr.methods.parts.generator import PromptGenerator
from pfedmoap_flwr.training import local
from support.federation import Exchange, Federate, make_method, make_work
from support.oracle import numbers, oracle

VECTOR = oracle("fedtpg_generator")


def names_of(layer: str, cross: bool, start: str) -> dict[str, str]:
    """Where the public code keeps what our layer of this name holds; the packed weights apart."""
    attention = f"{start}{'cross_attend_blocks.0' if cross else '0'}"
    forward = f"{start}{'cross_attend_blocks.1' if cross else '1'}.net"
    modules = {
        f"{layer}.norm": f"{attention}.norm",
        f"{layer}.attention.out": f"{attention}.fn.out_proj",
        f"{layer}.feed_forward.norm": f"{forward}.0",
        f"{layer}.feed_forward.widen": f"{forward}.1",
        f"{layer}.feed_forward.narrow": f"{forward}.3",
    }
    if cross:
        modules["norm_classes"] = f"{attention}.norm_context"
    return {f"{a}.{kind}": f"{b}.{kind}" for a, b in modules.items() for kind in ("weight", "bias")}


def of_the_public_code(case: dict[str, Any]) -> PromptGenerator:
    """Our generator with a case's weights."""
    depth, width = case["self_attention_depth"], case["dim"]
    made = PromptGenerator(width, width, case["heads"], depth, torch.Generator()).double()
    theirs = {name: numbers(values) for name, values in case["weights"].items()}
    renamed = names_of("first", True, "encoder.")
    packed = {"first": "encoder.cross_attend_blocks.0"}
    for i in range(depth):
        renamed |= names_of(f"layers.{i}", False, f"transformer.layers.{i}.")
        packed[f"layers.{i}"] = f"transformer.layers.{i}.0"
    state = {ours: theirs[name] for ours, name in renamed.items()}
    for layer, name in packed.items():
        for kind in ("weight", "bias"):
            parts = theirs[f"{name}.fn.in_proj_{kind}"].chunk(3)
            for part, values in zip(("query", "key", "value"), parts, strict=True):
                state[f"{layer}.attention.{part}.{kind}"] = values
    made.load_state_dict(state)
    return made


@pytest.mark.parametrize("case", VECTOR["cases"], ids=lambda c: str(c["self_attention_depth"]))
def test_16_contexts_and_gradient_are_those_of_the_public_code(case: dict[str, Any]) -> None:
    queries = numbers(case["weights"]["soft_prompt"]).requires_grad_()
    features = numbers(case["class_features"])
    seen = torch.ones(len(features), dtype=torch.bool)
    contexts = of_the_public_code(case)(queries, features, seen)
    torch.testing.assert_close(
        contexts, numbers(case["output"]).flatten(0, 1), rtol=1e-6, atol=1e-6
    )
    (gradient,) = torch.autograd.grad(contexts.square().sum(), queries)
    expected = numbers(case["grad_queries_of_sum_squares"])
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("n_ctx", "depth"), [(4, 0), (4, 4), (16, 0)])
def test_16_it_has_as_many_parameters_as_the_public_one(n_ctx: int, depth: int) -> None:
    made = PromptGenerator(512, 512, 4, depth, torch.Generator())
    count = sum(parameter.numel() for parameter in made.parameters()) + n_ctx * 512
    said = VECTOR["parameter_count_dim512"]
    assert count == said[f"len {n_ctx}, depth 1, self-attention {depth}"]


def test_a_class_that_is_not_seen_is_as_good_as_absent() -> None:
    generator = torch.Generator().manual_seed(0)
    made = PromptGenerator(8, 12, 2, 1, generator).double()
    queries = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    features = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    seen = torch.tensor([True, False, True, True, False])
    few = made(queries, features[seen], torch.ones(3, dtype=torch.bool))
    torch.testing.assert_close(made(queries, features, seen), few)
    every = made(queries, features, torch.ones(5, dtype=torch.bool))
    assert (every - few).abs().max() > 1e-3


def images_of(*labels: int) -> Split:
    features = torch.randn(len(labels), 64, generator=torch.Generator().manual_seed(0))
    return Split(features, torch.tensor(labels))


def test_a_client_trains_among_its_own_classes_and_is_measured_among_all() -> None:
    method = make_method("fedtpg")
    head = method.build()
    images = images_of(1, 3, 1)
    work = make_work(method, head, images)
    names = method.clip.zeroshot(method.task.classnames, "{}")
    own = torch.tensor([False, True, False, True])
    text = head.encoder(head.generator(head.ctx, names, own))
    logits = head.logit_scale * F.normalize(images.features, dim=-1) @ text.t()
    expected = F.cross_entropy(logits[:, own], torch.tensor([0, 1, 0]))
    loss = method.loss(head, images.features, images.labels, {})
    torch.testing.assert_close(loss, expected)
    work.head.eval()
    every = head.encoder(head.generator(head.ctx, names, torch.ones(4, dtype=torch.bool)))
    torch.testing.assert_close(head.encode(), every)
    assert (every - text).abs().max() > 1e-4


def test_without_its_own_classes_it_trains_among_all() -> None:
    method = make_method("fedtpg", **{"fedtpg.own-classes": False})
    work = make_work(method, method.build(), images_of(1, 3, 1))
    assert work.head.held.all()
    # A client without images has no classes of its own
    assert make_work(make_method("fedtpg"), make_method("fedtpg").build()).head.held.all()


def test_queries_and_generator_are_trained_and_travel(
    federate: Federate, wire: list[Exchange]
) -> None:
    federate(method="fedtpg", num_server_rounds=1, local_epochs=1)
    method = make_method("fedtpg", local_epochs=1)
    head = method.build()
    names = {name for name, _ in head.named_parameters()}
    assert {name for exchange in wire for name in exchange.down} == names
    start = head.state()
    local.train(method, [make_work(method, head, images_of(0, 1, 2, 3))])
    # A key's bias moves all scores alike, which softmax does not see
    still = {n for n, t in head.state().items() if (t - start[n]).abs().max() < 1e-9}
    assert still <= {"generator.first.attention.key.bias"}


def test_the_mean_is_plain() -> None:
    method = make_method("fedtpg")
    state = method.start()
    uploads = {}
    for i, value in enumerate((1.0, 5.0)):
        tensors = {name: torch.full_like(t, value) for name, t in state.shared.items()}
        uploads[i] = Upload(tensors, num_examples=1 + 99 * i)
    method.merge(state, uploads)
    assert all((tensor == 3).all() for tensor in state.shared.values())


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(UsageError, match=r"fedtpg\.heads=5: must divide CLIP's width 32"):
        make_method("fedtpg", **{"fedtpg.heads": 5}).build()


def test_a_context_of_every_class_comes_from_its_own_queries() -> None:
    method = make_method("fedtpg", **{"prompt.class-specific": True})
    head = method.build()
    assert head.ctx.shape == (4, 4, 32)
    assert head.encode().shape == (4, 64)
