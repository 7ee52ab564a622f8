"""Fed-MP: adapter and residual, the weighted merge, the stream at test time, what travels."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.base import ServerState, Split, Upload
from pfedmoap_flwr.methods.parts.adapters import AttentionAdapter
from pfedmoap_flwr.training import local
from support.federation import Exchange, Federate, kept_head, make_method, make_work
from support.oracle import numbers, oracle
from support.tiny import NUM_CLIENTS

# Fed-MP is measured without its residual; what two images of a class are to each other: see FedCLIP
OVERFITTING = {"fedmp.alpha": 0, "fedmp.lr": 0.01, "fedmp.decay": 0, "fedmp.same-class": "ignored"}
VECTOR = oracle("fedmp_adapter")
ADAPTER, WEIGHTS = VECTOR["adapter"], VECTOR["weights"]
IMAGES = Split(torch.randn(8, 64, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3)
NAMES = {f"adapter.{layer}.{kind}" for layer in ("inner", "outer") for kind in ("weight", "bias")}


def oracle_head(method: Any) -> Any:
    """A head with the weights, texts, residual and scale of the oracle; its images are 0, 1, 2."""
    head = method.build().double()
    head.adapter = AttentionAdapter(4, torch.Generator()).double()
    for name, number in {"inner": "0", "outer": "2"}.items():
        for kind in ("weight", "bias"):
            value = numbers(ADAPTER["weights"][f"{number}.{kind}"])
            getattr(head.adapter, name).register_parameter(kind, nn.Parameter(value))
    # The public code's residual is indexed by position: images 0 and 2 share a row
    rows = numbers(ADAPTER["residual"])[ADAPTER["class_position"]]
    head.residual.rows = nn.Parameter(rows)
    head.text_features = numbers(ADAPTER["text"])
    head.logit_scale = ADAPTER["logit_scale"]
    return head


def test_16_adapter_residual_loss_and_gradient_are_those_of_the_public_code() -> None:
    method: Any = make_method("fedmp", **{"fedmp.alpha": ADAPTER["alpha"]})
    head = oracle_head(method)
    images = numbers(ADAPTER["image"])
    close: Any = {"rtol": 1e-6, "atol": 1e-7}
    adapted = F.normalize(head.adapter(images), dim=-1)
    torch.testing.assert_close(adapted, numbers(ADAPTER["adapted_unit_image"]), **close)
    expected = numbers(ADAPTER["text_with_residual_unit"])
    torch.testing.assert_close(head.encode(), expected, **close)
    loss = method.loss(head, images, torch.arange(3), {})
    torch.testing.assert_close(loss, numbers(ADAPTER["loss"]), **close)
    of_inner, of_residual = torch.autograd.grad(
        loss, [head.adapter.inner.weight, head.residual.rows]
    )
    expected = numbers(ADAPTER["grad_first_linear"])
    torch.testing.assert_close(of_inner, expected, rtol=1e-5, atol=1e-7)
    assert of_residual.abs().min() > 0


def merged(compat: str, client_text: list[Tensor], adapters: Tensor) -> tuple[Any, ServerState]:
    """The state after a merge of these clients, among the oracle's classes."""
    method: Any = make_method("fedmp", compat=compat)

    class Head:
        text_features = numbers(WEIGHTS["global_text"])

    method.build = Head
    state = ServerState({"adapter": torch.zeros_like(adapters[0])})
    uploads = {
        i: Upload({"adapter": adapters[i], "classes": text.sum(0)}, num_examples=1 + 9 * i)
        for i, text in enumerate(client_text)
    }
    method.merge(state, uploads)
    return method, state


def test_16_released_adapters_are_averaged_by_the_plain_ratio() -> None:
    texts = [numbers(text) for text in WEIGHTS["client_text"]]
    _, state = merged("released", texts, numbers(WEIGHTS["adapters"]))
    expected = numbers(WEIGHTS["average"])
    torch.testing.assert_close(state.shared["adapter"], expected, rtol=1e-3, atol=1e-3)
    smallest = min(WEIGHTS["similarity"])
    assert smallest < 0
    assert state.metrics["smallest-similarity"] == pytest.approx(smallest, abs=1e-4)


def test_16_by_default_who_is_dissimilar_does_not_count() -> None:
    texts, adapters = [numbers(t) for t in WEIGHTS["client_text"]], numbers(WEIGHTS["adapters"])
    _, state = merged("paper", texts, adapters)
    a, _, c = WEIGHTS["similarity"]
    expected = (a * adapters[0] + c * adapters[2]) / (a + c)
    torch.testing.assert_close(state.shared["adapter"], expected, rtol=1e-3, atol=1e-3)
    _, state = merged("paper", [texts[1], texts[1]], adapters)
    torch.testing.assert_close(state.shared["adapter"], (adapters[0] + adapters[1]) / 2)


def test_the_upload_sums_the_texts_of_the_classes_that_a_client_has() -> None:
    method = make_method("fedmp")
    head = method.build()
    work = make_work(method, head, IMAGES, method.send(method.start(), [0], train=True)[0])
    sent = method.upload(work)
    assert sent.keys() == NAMES | {"classes"}
    mixed = head.text_features + 0.3 * head.residual.rows
    expected = sum(mixed[c] / mixed[c].norm() for c in (0, 1, 2))
    torch.testing.assert_close(sent["classes"], expected.detach())


def test_only_the_residual_of_classes_at_hand_gets_a_gradient() -> None:
    method = make_method("fedmp")
    head = method.build()
    method.loss(head, IMAGES.features, IMAGES.labels, {}).backward()
    moved = head.residual.rows.grad.abs().sum(-1)
    assert (moved[:3] > 0).all()
    assert moved[3] == 0


def test_the_residual_has_no_say_when_a_head_is_measured() -> None:
    head = make_method("fedmp").build()
    training = head(IMAGES.features)
    head.eval()
    adapted = F.normalize(head.adapter(IMAGES.features), dim=-1)
    measured = head(IMAGES.features)
    torch.testing.assert_close(measured, head.logit_scale * adapted @ head.text_features.t())
    assert (measured - training).abs().max() > 0.1


def streamed(method: Any, head: Any, features: Tensor) -> Tensor:
    with torch.no_grad():
        return head.eval().predict(features, head.encode())


def test_adapt_reads_no_label_and_an_image_sees_none_after_it() -> None:
    method = make_method("fedmp", **{"fedmp.uncertainty": 1.0})
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(20, 64, generator=generator)
    head = method.build()
    plain = streamed(method, head, features)
    asked: list[str] = []
    work = make_work(method, head)
    object.__setattr__(work, "split", asked.append)
    method.adapt(work)
    assert asked == []
    whole = streamed(method, head, features)
    # The first image has the text alone; later ones have prototypes
    torch.testing.assert_close(whole[0], plain[0])
    assert (whole - plain).abs().max() > 1
    # Other images afterwards change nothing before, and a second look begins anew
    other = torch.cat([features[:12], torch.randn(8, 64, generator=generator)])
    torch.testing.assert_close(streamed(method, head, other)[:12], whole[:12])
    torch.testing.assert_close(streamed(method, head, features), whole)


def test_9_with_an_entropy_of_nothing_the_stream_is_the_adapter_alone() -> None:
    method = make_method("fedmp", **{"fedmp.uncertainty": 0.0})
    head = method.build()
    plain = streamed(method, head, IMAGES.features)
    method.adapt(make_work(method, head))
    torch.testing.assert_close(streamed(method, head, IMAGES.features), plain, rtol=1e-5, atol=1e-4)


def test_9_without_residual_a_client_trains_as_in_fedclip() -> None:
    works = []
    for made in (make_method("fedmp", **{"fedmp.alpha": 0.0}), make_method("fedclip")):
        received = made.send(made.start(), [0], train=True)[0]
        works.append(make_work(made, made.build(), IMAGES, received))
        local.train(made, works[-1:])
    ours, theirs = (dict(work.head.named_parameters()) for work in works)
    assert theirs.keys() == NAMES
    start = make_method("fedclip").build().adapter.inner.weight
    for name in NAMES:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-7)
    assert (ours["adapter.inner.weight"] - start).abs().max() > 1e-4


def test_adam_has_the_settings_of_the_public_code() -> None:
    method: Any = make_method("fedmp")
    head = method.build()
    groups = [{"name": n, "params": [p]} for n, p in head.named_parameters()]
    found = method.optimizer(make_work(method, head), groups).defaults
    assert (found["betas"], found["eps"], found["weight_decay"]) == ((0.9, 0.98), 1e-6, 0.2)
    assert method.lr("residual.rows", 1, 2) == 5e-5


def test_adapter_and_classes_travel_and_the_residual_stays(
    federate: Federate, wire: list[Exchange]
) -> None:
    run = federate(method="fedmp", num_server_rounds=2)
    trained = [e for e in wire if e.kind == "train"]
    assert len(trained) == 2 * NUM_CLIENTS
    for exchange in trained:
        assert exchange.down.keys() == NAMES
        assert exchange.up.keys() == NAMES | {"classes"}
    start = make_method("fedmp").build().residual.rows
    for number in range(NUM_CLIENTS):
        first, second = (kept_head(run, number, after)["residual.rows"] for after in (1, 2))
        # It goes on from round to round, where the public code begins anew
        assert 0 < (first - start).abs().max() < (second - start).abs().max()


def test_a_residual_without_a_start_is_refused() -> None:
    with pytest.raises(UsageError, match=r"fedmp.start=0.0: must be > 0"):
        make_method("fedmp", **{"fedmp.start": 0.0})
