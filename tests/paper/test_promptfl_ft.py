"""PromptFL + FT: trained as PromptFL, and fine-tuned for the personal measurement alone."""

from typing import Any

import pytest
import torch

from pfedmoap_flwr import config
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.base import Split
from pfedmoap_flwr.methods.promptfl_ft import PromptFLFT, PromptFLFTSettings
from pfedmoap_flwr.training import local
from support.federation import Exchange, Federate, make_method, make_work, rounds, tensor_files
from support.laws import THREE_ROUNDS
from support.tiny import NUM_CLIENTS


def fine_tuner(epochs: int, **changes: Any) -> PromptFLFT:
    made = make_method("promptfl_ft", **changes)
    return PromptFLFT(made.settings, PromptFLFTSettings(epochs=epochs), made.clip, made.task)


def images(count: int) -> Split:
    features = torch.randn(count, 64, generator=torch.Generator().manual_seed(count))
    return Split(features, torch.arange(count) % 3)


@pytest.mark.parametrize("compat", ["paper", "released"])
def test_fine_tuning_is_local_training_from_the_received_prompt(compat: str) -> None:
    # Batches of 8, 8 and 3
    method = fine_tuner(3, compat=compat, lr=0.05)
    received = method.start().shared
    adapted, trained = method.build(), method.build()
    adapted.ctx.data.add_(1)  # what the client kept has no say
    method.adapt(make_work(method, adapted, images(19), received, client_id=2, server_round=4))
    work = make_work(method, trained, images(19), received, client_id=2, server_round=4)
    local.train(method, [work], [(3, ("ctx",))])
    torch.testing.assert_close(adapted.ctx, trained.ctx, rtol=1e-5, atol=1e-6)
    assert (adapted.ctx - received["ctx"]).abs().max() > 1e-3
    # Another client's order of images, or one epoch less, is further off than rounding
    for client_id, epochs in ((3, 3), (2, 2)):
        other = method.build()
        work = make_work(method, other, images(19), received, client_id, server_round=4)
        local.train(method, [work], [(epochs, ("ctx",))])
        assert (adapted.ctx - other.ctx).abs().max() > 1e-4


def test_two_steps_by_hand() -> None:
    method = fine_tuner(2, lr=0.1, batch_size=32)
    data, received = images(6), method.start().shared
    expected = method.build()
    for _ in range(2):
        logits = expected.logit_scale * (
            data.features / data.features.norm(dim=-1, keepdim=True) @ expected.encode().t()
        )
        loss = -logits.log_softmax(-1)[torch.arange(6), data.labels].mean()
        (gradient,) = torch.autograd.grad(loss, expected.ctx)
        expected.ctx.data -= 0.1 * gradient
    head = method.build()
    method.adapt(make_work(method, head, data, received))
    torch.testing.assert_close(head.ctx, expected.ctx, rtol=1e-4, atol=1e-5)
    assert (head.ctx - received["ctx"]).abs().max() > 1e-3


def test_a_client_without_images_is_measured_with_the_received_prompt() -> None:
    method = fine_tuner(3)
    received = {"ctx": torch.randn(4, 32)}
    head = method.build()
    method.adapt(make_work(method, head, None, received))
    assert torch.equal(head.ctx, received["ctx"])


def test_nothing_of_the_fine_tuning_is_sent_or_kept(
    reference: Federate, federate: Federate, wire: list[Exchange]
) -> None:
    options = {**THREE_ROUNDS, "lr": 0.01}
    ours = federate("ours/run", method="promptfl_ft", **options)
    assert {name for e in wire for name in (*e.up, *e.down)} == {"ctx"}
    theirs = reference(method="promptfl", **options)
    assert tensor_files(ours) == tensor_files(theirs)
    for record, plain in zip(ours.rounds(), theirs.rounds(), strict=True):
        assert record.train_loss == plain.train_loss
        for i in range(NUM_CLIENTS):
            assert record.clients[i]["global-accuracy"] == plain.clients[i]["global-accuracy"]
    assert rounds(ours) != rounds(theirs)


@pytest.mark.slow
def test_9_without_epochs_the_personal_model_is_the_global_one(
    reference: Federate, federate: Federate
) -> None:
    ours = federate(
        "ours/run", method="promptfl_ft", flat={"promptfl_ft.epochs": 0}, **THREE_ROUNDS
    )
    theirs = reference(method="promptfl", **THREE_ROUNDS)
    assert tensor_files(ours) == tensor_files(theirs)
    for record in ours.rounds():
        for measured in record.clients.values():
            assert measured["personal-accuracy"] == measured["global-accuracy"]


def test_a_newcomer_fine_tunes_too(federate: Federate, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted: list[tuple[int, int]] = []
    adapt = PromptFLFT.adapt

    def noted(self: Any, work: Any) -> None:
        before = work.received["ctx"].clone()
        adapt(self, work)
        if not torch.equal(work.head.ctx, before):
            adapted.append((work.round, work.client_id))

    monkeypatch.setattr(PromptFLFT, "adapt", noted)
    federate(method="promptfl_ft", num_server_rounds=1, fraction_train=0.5)
    assert sorted(adapted) == [(r, i) for r in (0, 1) for i in range(NUM_CLIENTS)]


def test_a_negative_number_of_epochs_is_refused() -> None:
    with pytest.raises(UsageError, match=r"promptfl_ft\.epochs=-1: must be >= 0"):
        config.parse({"method": "promptfl_ft", "promptfl_ft.epochs": -1})
