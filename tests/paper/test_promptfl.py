"""PromptFL: cross-entropy from P_g on, and the mean by numbers of images, by hand in float64."""

from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from torch.nn import functional as F

from pfedmoap_flwr.assets import asset
from pfedmoap_flwr.methods.base import Split, Upload
from pfedmoap_flwr.runs import checkpoint
from pfedmoap_flwr.training import local
from support.federation import Exchange, Federate, make_method, make_work
from support.models import whole
from support.tiny import CLASSNAMES, NUM_CLIENTS


def images(count: int) -> Split:
    generator = torch.Generator().manual_seed(count)
    return Split(torch.randn(count, 64, generator=generator), torch.arange(count) % 4)


def test_16_logits_are_those_of_open_clip_where_the_context_is_words() -> None:
    head = make_method("promptfl", **{"prompt.ctx-init": "a photo of a"}).build()
    model = whole("tiny", asset("clip/tiny.safetensors"))
    tokens = open_clip.get_tokenizer("tiny")(
        [f"a photo of a {name.replace('_', ' ')}." for name in CLASSNAMES]
    )
    text = F.normalize(model.encode_text(tokens), dim=-1)
    features = images(6).features
    cosines = F.normalize(features, dim=-1) @ text.t()
    expected = model.logit_scale.exp() * cosines
    torch.testing.assert_close(head(features), expected, rtol=1e-4, atol=1e-4)
    assert (expected[:, 1:] - expected[:, :-1]).abs().max() > 0.1


def test_16_an_epoch_of_one_batch_is_one_step_of_gradient_descent() -> None:
    method = make_method("promptfl", local_epochs=3, batch_size=8, lr=0.05)
    data, head = images(8), method.build()
    ctx = head.ctx.detach().double()
    for _ in range(3):
        step = head.ctx.detach().clone().copy_(ctx).requires_grad_()
        cosines = F.normalize(data.features, dim=-1) @ head.encoder(step).t()
        right = (head.logit_scale * cosines).log_softmax(-1)[torch.arange(8), data.labels]
        (gradient,) = torch.autograd.grad(-right.mean(), step)
        ctx -= 0.05 * gradient.double()
    local.train(method, [make_work(method, head, data)])
    moved = (ctx - method.build().ctx.detach()).abs().max()
    assert moved > 1e-3
    torch.testing.assert_close(head.ctx.detach().double(), ctx, rtol=0, atol=1e-3 * float(moved))


def test_16_the_server_averages_by_numbers_of_images() -> None:
    method = make_method("promptfl")
    state = method.start()
    values = {7: (1.0, 10), 0: (2.0, 30), 3: (4.0, 60)}
    uploads = {i: Upload({"ctx": torch.full((4, 32), v)}, n) for i, (v, n) in values.items()}
    method.merge(state, uploads)
    # (10 * 1 + 30 * 2 + 60 * 4) / 100
    torch.testing.assert_close(state.shared["ctx"], torch.full((4, 32), 3.1))


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_16_every_round_starts_from_the_mean_of_the_one_before(
    fraction: float, federate: Federate, wire: list[Exchange]
) -> None:
    run = federate(method="promptfl", num_server_rounds=3, fraction_train=fraction)
    means: list[Any] = [make_method("promptfl").build().ctx.detach().numpy()]
    for server_round in (1, 2, 3):
        sent = [e for e in wire if (e.kind, e.round) == ("train", server_round)]
        assert len(sent) == fraction * NUM_CLIENTS
        assert all(e.down.keys() == e.up.keys() == {"ctx"} for e in sent)
        for exchange in sent:
            np.testing.assert_allclose(exchange.down["ctx"].numpy(), means[-1], rtol=2e-7)
        sizes = [int(e.reply.content["metrics"]["num-examples"]) for e in sent]
        assert len(set(sizes)) == len(sizes)
        prompts = np.stack([e.up["ctx"].double().numpy() for e in sent])
        means.append(np.average(prompts, axis=0, weights=sizes))
    shared = checkpoint.load(run.path).shared["ctx"].numpy()
    np.testing.assert_allclose(shared, means[3], rtol=2e-7)
