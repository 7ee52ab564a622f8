"""TOFA: the power posterior, the sentences, the fusion, and what one round sends."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.base import Split, Upload
from pfedmoap_flwr.methods.parts.gaussian import fit_posterior
from pfedmoap_flwr.methods.parts.moments import statistics
from pfedmoap_flwr.methods.parts.sentences import mixed_texts, sentence_scores, texts_of
from support.federation import Exchange, Federate, make_method, make_work, rounds
from support.tiny import NUM_CLIENTS

STATISTICS = {"counts", "sums", "moments"}


def images(n: int, seed: int, d: int = 64) -> Split:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (n,), generator=generator)
    centres = torch.randn(4, d, generator=torch.Generator().manual_seed(99))
    return Split(centres[labels] + torch.randn(n, d, generator=generator), labels)


def weighted_classifier(
    x: Tensor, labels: Tensor, weights: Tensor, prior: float
) -> tuple[Tensor, Tensor]:
    """The classifier of images that each count `weights` times, sum by sum."""
    x, weights = x.double(), weights.double()
    d, total = x.shape[1], weights.sum()
    means, shares = [], []
    for c in range(4):
        of = labels == c
        shares.append(weights[of].sum() / total)
        means.append((weights[of, None] * x[of]).sum(0) / weights[of].sum())
    centred = x - torch.stack(means)[labels]
    scatter = sum(w * torch.outer(v, v) for w, v in zip(weights, centred, strict=True))
    tau = scatter.trace() / total / d
    covariance = (scatter + prior * d * tau * torch.eye(d).double()) / (total + prior * d)
    inverse = torch.linalg.inv(covariance + 1e-6 * torch.eye(d).double())
    weight = torch.stack([inverse @ mean for mean in means])
    bias = [math.log(p) - (m @ inverse @ m).item() / 2 for p, m in zip(shares, means, strict=True)]
    return weight, torch.tensor(bias, dtype=torch.float64)


@pytest.mark.parametrize(("alpha", "prior"), [(0.1, 1.0), (2.0, 0.3)])
def test_16_all_clients_images_count_alpha_times_beside_a_clients_own(
    alpha: float, prior: float
) -> None:
    own, others = images(20, 0, d=5), images(70, 1, d=5)
    # One class that the client lacks and of which others have very few images
    own.labels[own.labels == 3] = 2
    others.labels[others.labels == 3] = 2
    others.labels[:2] = 3
    x = torch.cat([own.features, others.features])
    labels = torch.cat([own.labels, others.labels])
    # All clients' images are the client's own too
    weights = torch.cat([torch.full((20,), 1 + alpha), torch.full((70,), alpha)])
    weight, bias = weighted_classifier(x, labels, weights, prior)
    of_own = statistics(own.features, own.labels, 4, "lda")
    of_all = statistics(x, labels, 4, "lda")
    found = fit_posterior({n: of_own[n] + alpha * of_all[n] for n in of_own}, prior)
    torch.testing.assert_close(found["weight"].double(), weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["bias"].double(), bias, rtol=1e-4, atol=1e-4)


def test_16_sentences_are_scored_by_what_they_do_to_their_own_class() -> None:
    generator = torch.Generator().manual_seed(0)
    texts = F.normalize(torch.randn(3, 4, 6, generator=generator), dim=-1).double()
    x = F.normalize(torch.randn(7, 6, generator=generator), dim=-1).double()
    labels = torch.tensor([0, 1, 1, 0, 3, 3, 3])
    scores = sentence_scores(x, labels, texts, logit_scale=5.0)
    assert (scores[:, 2] == 0).all()
    assert (scores[0] == 0).all()
    for c in (0, 1, 3):
        u = []
        for m in range(3):
            text = texts[0].clone()
            text[c] = texts[m, c]
            u.append((5.0 * x[labels == c] @ text.t()).softmax(-1)[:, c].mean())
        for m in range(3):
            torch.testing.assert_close(scores[m, c], u[0] * (u[m] / u[0]).log())


def test_the_best_sentences_are_mixed_by_the_softmax_of_their_scores() -> None:
    texts = torch.eye(3)[:, None].expand(3, 2, 3)
    scores = torch.tensor([[0.0, 0.0], [math.log(3.0), -1.0], [-5.0, math.log(2.0)]])
    mixed = mixed_texts(texts, scores, best=2)
    expected = F.normalize(torch.tensor([[0.25, 0.75, 0.0], [1 / 3, 0.0, 2 / 3]]), dim=-1)
    torch.testing.assert_close(mixed, expected)
    torch.testing.assert_close(mixed_texts(texts, scores, best=1), torch.eye(3)[[1, 2]])


def test_the_surer_modality_weighs_more() -> None:
    method: Any = make_method("tofa")
    head = method.build()
    head.weight, head.bias = torch.randn(4, 64), torch.randn(4)
    x = F.normalize(torch.randn(5, 64), dim=-1)
    visual = x @ head.weight.t() + head.bias
    text = head.logit_scale * x @ head.text_features.t()
    for i in range(5):
        sure, other = visual[i].softmax(0).max().item(), text[i].softmax(0).max().item()
        # The paper's sigmoid of the log ratio
        eta = 1 / (1 + math.exp(-math.log(sure / other)))
        expected = eta * visual[i] + (1 - eta) * text[i]
        torch.testing.assert_close(head(7 * x)[i], expected, rtol=1e-4, atol=1e-4)


def test_before_any_statistics_it_is_zero_shot_clip() -> None:
    method = make_method("tofa")
    assert method.send(method.start(), [0, 1], train=True) == {0: {}, 1: {}}
    x = torch.randn(20, 64)
    plain = make_method("zeroshot").build()(x)
    assert torch.equal(method.build()(x).argmax(1), plain.argmax(1))


def test_the_global_model_is_of_all_and_the_personal_one_has_its_own_images_too() -> None:
    method: Any = make_method("tofa", **{"tofa.alpha": 0.3})
    parts = {i: images(30, i) for i in range(3)}
    state = method.start()
    uploads = {
        i: Upload(method.upload(make_work(method, method.build(), part)), len(part))
        for i, part in parts.items()
    }
    method.merge(state, uploads)
    assert state.extra["counts"].sum() == 90
    received = method.send(state, [1], train=False)[1]
    head = method.build()
    head.load(received)
    work = make_work(method, head, parts[1], received)
    x = F.normalize(torch.cat([part.features for part in parts.values()]), dim=-1)
    labels = torch.cat([part.labels for part in parts.values()])
    weight, bias = weighted_classifier(x, labels, torch.ones(90), 1.0)
    torch.testing.assert_close(head.weight.double(), weight, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(head.bias.double(), bias, rtol=1e-2, atol=1e-2)
    method.adapt(work)
    weights = torch.full((90,), 0.3)
    weights[30:60] += 1
    weight, bias = weighted_classifier(x, labels, weights, 1.0)
    torch.testing.assert_close(head.weight.double(), weight, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(head.bias.double(), bias, rtol=1e-2, atol=1e-2)
    scores = torch.stack([u.tensors["scores"] for u in uploads.values()]).mean(0)
    text = mixed_texts(texts_of(method.clip, method.task), scores, best=3)
    torch.testing.assert_close(head.text_features, text)
    assert head(parts[1].features).isfinite().all()


def test_one_round_is_enough(federate: Federate, wire: list[Exchange]) -> None:
    run = federate(method="tofa", num_server_rounds=3)
    for exchange in wire:
        first = exchange.round == 0 or (exchange.kind, exchange.round) == ("train", 1)
        assert exchange.down.keys() == (set() if first else {*STATISTICS, "text_features"})
        if exchange.kind == "train":
            assert exchange.up.keys() == {*STATISTICS, "scores"}
            assert exchange.up["scores"].shape == (8, 4)
    start, *later = rounds(run)
    assert len(later[0]["clients"]) == NUM_CLIENTS
    assert later[0]["clients"] == later[1]["clients"] == later[2]["clients"]
    assert later[0]["clients"] != start["clients"]
    assert list(run.path.rglob("*.safetensors"))


def test_more_sentences_than_there_are_is_refused() -> None:
    with pytest.raises(UsageError, match=r"tofa.best=9: must be >= 1 and <= 8"):
        make_method("tofa", **{"tofa.best": 9})
