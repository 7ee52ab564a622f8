"""The abstraction's own promises: hooks, metrics, splits, averages."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pfedmoap_flwr.federation import client
from pfedmoap_flwr.methods.base import Method, ServerState, Split, Upload, Work
from pfedmoap_flwr.methods.parts.mean import average
from pfedmoap_flwr.methods.promptfl import PromptFL
from pfedmoap_flwr.training.node import Node
from support.federation import Exchange, Federate, make_method
from support.tiny import NUM_CLIENTS


def uploads(**values: tuple[float, int]) -> dict[int, Upload]:
    """Uploads by client, of one tensor "x" (2,) that holds a value, with a number of images."""
    return {
        int(name[1:]): Upload({"x": torch.full((2,), value)}, n)
        for name, (value, n) in values.items()
    }


def test_the_average_is_weighted_by_the_number_of_images() -> None:
    means = average(uploads(c3=(1.0, 1), c1=(4.0, 3)), {"x": torch.zeros(2)})
    assert means["x"].tolist() == [3.25, 3.25]


def test_the_average_takes_other_weights_and_keeps_what_nobody_sent() -> None:
    old = {"x": torch.zeros(2), "y": torch.full((3,), 7.0)}
    sent = uploads(c0=(1.0, 100), c1=(5.0, 1))
    sent[1].tensors["z"] = torch.ones(1)
    means = average(sent, old, weights={0: 1.0, 1: 1.0})
    assert means["x"].tolist() == [3.0, 3.0]
    assert means["y"].tolist() == [7.0] * 3
    assert means.keys() == old.keys()


def test_a_tensor_counts_for_those_who_sent_it() -> None:
    sent = uploads(c0=(1.0, 1), c1=(5.0, 3), c2=(9.0, 1))
    del sent[2].tensors["x"]
    assert average(sent, {"x": torch.zeros(2)})["x"].tolist() == [4.0, 4.0]


def test_the_average_keeps_the_dtype_and_sums_in_float64() -> None:
    # In float32 the small one would be lost
    sent = uploads(c0=(1e8, 1), c1=(1.0, 1), c2=(-1e8, 1))
    mean = average(sent, {"x": torch.zeros(2)})["x"]
    assert mean.dtype == torch.float32
    np.testing.assert_allclose(mean, [1 / 3] * 2, rtol=1e-6)


def test_a_head_takes_what_it_has_by_name_and_refuses_another_shape() -> None:
    head = make_method("promptfl").build()
    head.register_buffer("seen", None)
    inner = nn.Linear(2, 2)
    head.inner = inner
    ctx = torch.randn(4, 32)
    head.load({"ctx": ctx, "seen": torch.arange(3), "inner.bias": torch.ones(2), "else": ctx})
    assert torch.equal(head.ctx, ctx)
    assert head.seen.tolist() == [0, 1, 2]
    assert inner.bias.tolist() == [1.0, 1.0]
    head.load({"seen": torch.arange(5)})
    assert len(head.seen) == 5
    with pytest.raises(ValueError, match=r"ctx has shape \(3, 32\), not \(4, 32\)"):
        head.load({"ctx": ctx[1:]})
    # What was loaded is nobody else's
    ctx.zero_()
    assert head.ctx.abs().sum() > 0


def test_a_split_is_predicted_in_parts_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    head = make_method("promptfl").build()
    features = torch.randn(1030, 64)
    encoded = head.encode()
    sizes: list[int] = []
    classify = head.classify

    def counted(images: Tensor, encoded: Tensor) -> Tensor:
        sizes.append(len(images))
        return classify(images, encoded)

    monkeypatch.setattr(head, "classify", counted)
    torch.testing.assert_close(head.predict(features, encoded), classify(features, encoded))
    assert sizes == [1024, 6]
    sizes.clear()
    assert head.predict(features[:0], encoded).shape == (0, 4)


def test_a_methods_own_metrics_are_in_the_rounds(
    federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = Method.merge

    def measured(self: Any, work: Work[Any]) -> dict[str, float]:
        return {"loss": 0.5 + work.client_id}

    def merged(self: Any, state: ServerState, uploads: Any) -> None:
        merge(self, state, uploads)
        state.metrics["epsilon"] = 2.0 * (state.round + 1)

    monkeypatch.setattr(PromptFL, "metrics", measured, raising=False)
    monkeypatch.setattr(PromptFL, "merge", merged, raising=False)
    before, *trained = federate(method="promptfl", num_server_rounds=2).rounds()
    assert (before.metrics, before.client_metrics) == ({}, {})
    assert [record.metrics for record in trained] == [{"epsilon": 2.0}, {"epsilon": 4.0}]
    for record in trained:
        # A metric may have any name, one of ours too
        assert record.client_metrics == {i: {"loss": 0.5 + i} for i in range(NUM_CLIENTS)}
        assert record.train_loss is not None
        assert record.train_loss != 0.5


def test_what_is_measured_as_personal_is_adapted_and_the_global_model_is_not(
    federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = federate("plain/run", method="promptfl", num_server_rounds=1).rounds()

    def spoil(self: Any, work: Work[Any]) -> None:
        assert len(work.images)
        work.head.ctx.data.mul_(0).add_(50.0)

    monkeypatch.setattr(PromptFL, "adapt", spoil, raising=False)
    run = federate("adapted/run", method="promptfl", num_server_rounds=1)
    for record, plain in zip(run.rounds(), expected, strict=True):
        for i, metrics in record.clients.items():
            assert metrics["global-accuracy"] == plain.clients[i]["global-accuracy"]
        assert record.mean("personal-accuracy") != plain.mean("personal-accuracy")
    # Adaptation is for the measurement: what the client keeps is what it trained
    assert [r.train_loss for r in run.rounds()] == [r.train_loss for r in expected]


def test_a_message_reads_the_splits_that_it_needs(
    federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    seen: set[tuple[str, str]] = set()
    split = Node.split

    def noted(self: Node, client_id: int, name: str) -> Split:
        seen.add((asked[-1], name))
        return split(self, client_id, name)

    def watched(kind: str, handler: Any) -> Any:
        def handle(*arguments: Any) -> Any:
            asked.append(kind)
            return handler(*arguments)

        return handle

    monkeypatch.setattr(Node, "split", noted)
    for kind, handler in client.HANDLERS.items():
        monkeypatch.setitem(client.HANDLERS, kind, watched(kind, handler))
    federate("plain", method="promptfl", num_server_rounds=1)
    assert set(asked) == {"query", "train", "evaluate"}
    assert seen == {("train", "train"), ("evaluate", "test"), ("evaluate", "validation")}

    def curious(self: Any, work: Work[Any]) -> None:
        assert len(work.validation) < len(work.images)

    monkeypatch.setattr(PromptFL, "prepare", curious, raising=False)
    seen.clear()
    federate("curious", method="promptfl", num_server_rounds=1)
    assert seen >= {("train", "validation"), ("evaluate", "train")}


def test_reports_go_up_beside_the_shared_parameters_and_not_down(
    federate: Federate, monkeypatch: pytest.MonkeyPatch, wire: list[Exchange]
) -> None:
    upload = Method.upload

    def reported(self: Any, work: Work[Any]) -> dict[str, Tensor]:
        counts = work.images.labels.bincount(minlength=4).cpu()
        return upload(self, work) | {"counts": counts, "scalar": torch.tensor(0.5)}

    examples = {"counts": torch.zeros(4, dtype=torch.long), "scalar": torch.tensor(0.0)}
    monkeypatch.setattr(PromptFL, "reports", lambda self: examples, raising=False)
    monkeypatch.setattr(PromptFL, "upload", reported, raising=False)
    run = federate("good", method="promptfl", num_server_rounds=1)
    assert not any(record.failed for record in run.rounds())
    assert {name for e in wire for name in e.up} == {"ctx", "counts", "scalar"}
    assert {name for e in wire for name in e.down} == {"ctx"}
    # A report of another type or shape is refused by name
    examples["counts"] = torch.zeros(5, dtype=torch.long)
    with pytest.raises(RuntimeError, match=r"counts has shape \(4,\), not \(5,\)"):
        federate("bad", method="promptfl", num_server_rounds=1)
