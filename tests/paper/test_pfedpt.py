"""pFedPT: a personal frame of pixels, trained through the live image tower."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pfedmoap_flwr.methods.base import Split, Tensors
from pfedmoap_flwr.training import local
from support.federation import Exchange, make_method, make_work, rounds


def test_logits_are_those_of_open_clip_on_framed_pixels() -> None:
    method = make_method("pfedpt", **{"pfedpt.width": 3})
    head = method.build()
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    framed = pixels.clone()
    for y in range(16):
        for x in range(16):
            if not (3 <= y < 13 and 3 <= x < 13):
                framed[:, :, y, x] += head.frame[:, y, x].detach()
    with method.clip.image_tower() as tower:
        seen = F.normalize(tower(framed), dim=-1)
    expected = head.logit_scale * seen @ head.encoder(head.ctx).t()
    torch.testing.assert_close(head(pixels), expected, rtol=1e-4, atol=1e-4)
    assert 0.8 < head.frame.std() < 1.2


def test_the_frame_moves_first_then_the_prompt() -> None:
    method = make_method("pfedpt", local_epochs=1, batch_size=8)
    images = Split(torch.randn(8, 3, 16, 16), torch.arange(8) % 4)
    frames, prompts = [], []
    loss_of = method.loss

    def seen(head: Any, features: Tensor, labels: Tensor, received: Tensors) -> Tensor:
        frames.append(head.frame.detach().clone())
        prompts.append(head.ctx.detach().clone())
        return loss_of(head, features, labels, received)

    method.loss = seen
    head = method.build()
    start = head.state()
    local.train(method, [make_work(method, head, images)])
    assert torch.equal(frames[0], start["frame"])
    assert torch.equal(prompts[0], prompts[1])
    assert (frames[1] - frames[0]).abs().max() > 1e-4
    end = head.state()
    assert torch.equal(end["frame"], frames[1])
    assert (end["ctx"] - start["ctx"]).abs().max() > 1e-6
    # Inside the frame nothing is learned
    inside = (slice(None), slice(2, 14), slice(2, 14))
    assert torch.equal(end["frame"][inside], start["frame"][inside])


def test_the_frame_never_leaves_its_client(federate: Any, wire: list[Exchange]) -> None:
    run = federate(method="pfedpt", num_server_rounds=2, local_epochs=1)
    assert {name for e in wire for name in (*e.up, *e.down)} == {"ctx"}
    assert all("personal-accuracy" in m for m in rounds(run)[-1]["clients"].values())
