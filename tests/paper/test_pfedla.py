"""pFedLA: a personal attention over patches, against PyTorch's own, and who keeps what."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.base import Split
from pfedmoap_flwr.methods.parts.attention import ResidualAttention
from pfedmoap_flwr.training import local
from support.federation import Exchange, Federate, kept_head, make_method, make_work
from support.tiny import NUM_CLIENTS


@pytest.mark.parametrize("heads", [1, 4])
def test_the_attention_is_pytorchs(heads: int) -> None:
    ours = ResidualAttention(8, heads, 0.3, torch.Generator().manual_seed(0)).double()
    theirs = nn.MultiheadAttention(8, heads, bias=False, batch_first=True).double()
    three = [layer.weight for layer in (ours.query, ours.key, ours.value)]
    theirs.load_state_dict({"in_proj_weight": torch.cat(three), "out_proj.weight": ours.out.weight})
    tokens = torch.randn(3, 5, 8, dtype=torch.float64)
    centred = tokens - tokens.mean(-1, keepdim=True)
    inputs = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    expected = tokens + 0.3 * theirs(inputs, inputs, inputs)[0]
    torch.testing.assert_close(ours(tokens), expected)
    assert (expected - tokens).abs().max() > 1e-3


def test_the_head_adds_what_it_saw_to_the_images_feature() -> None:
    method = make_method("pfedla", **{"pfedla.share": 0.5})
    head = method.build()
    tokens = torch.randn(2, 5, 64)
    seen = head.attention(tokens[:, 1:])
    x = (tokens[:, 0] + sum(seen[:, m] for m in range(4)) / 4).double()
    texts = head.encode().double()
    expected = head.logit_scale * x / x.norm(dim=-1, keepdim=True) @ texts.t()
    torch.testing.assert_close(head(tokens).double(), expected, rtol=1e-4, atol=1e-4)
    # The order of patches has no say, their number may be one
    torch.testing.assert_close(head(tokens[:, [0, 3, 1, 4, 2]]), head(tokens))
    assert head(tokens[:, :2]).shape == (2, 4)


def test_without_attention_it_is_promptfl_on_the_image_and_its_patches_mean() -> None:
    head = make_method("pfedla", **{"pfedla.share": 0.0}).build()
    plain = make_method("promptfl").build()
    tokens = torch.randn(2, 5, 64)
    mean = tokens[:, 0] + tokens[:, 1:].mean(1)
    torch.testing.assert_close(head(tokens), plain(mean))


def test_prompt_and_attention_are_trained_together() -> None:
    method = make_method("pfedla", local_epochs=1, batch_size=8, lr=0.1)
    head, start = method.build(), method.build()
    data = Split(F.normalize(torch.randn(8, 5, 64), dim=-1), torch.arange(8) % 4)
    F.cross_entropy(start(data.features), data.labels).backward()
    local.train(method, [make_work(method, head, data)])
    for (name, moved), before in zip(head.named_parameters(), start.parameters(), strict=True):
        assert before.grad is not None
        assert before.grad.any(), name
        torch.testing.assert_close(moved, before - 0.1 * before.grad, rtol=1e-5, atol=1e-6)


def test_the_attention_never_leaves_its_client(federate: Federate, wire: list[Exchange]) -> None:
    run = federate(method="pfedla", num_server_rounds=1)
    assert {name for e in wire for name in (*e.up, *e.down)} == {"ctx"}
    start = make_method("pfedla").build().state()
    kept = [kept_head(run, i) for i in range(NUM_CLIENTS)]
    for name in ("attention.query.weight", "attention.out.weight"):
        assert all((state[name] - start[name]).abs().max() > 1e-8 for state in kept)
        assert not torch.equal(kept[0][name], kept[1][name])


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(UsageError, match=r"pfedla\.heads=7: must divide CLIP's width 64"):
        make_method("pfedla", **{"pfedla.heads": 7}).build()
