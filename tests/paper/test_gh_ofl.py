"""GH-OFL: sufficient statistics up, a Gaussian classifier down, and rounds that change nothing."""

from typing import Any

import pytest
import torch
from sklearn.naive_bayes import GaussianNB
from torch import Tensor

from pfedmoap_flwr import config
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.base import ServerState, Split, Upload
from pfedmoap_flwr.methods.parts.gaussian import fit, scatter, shrunk
from pfedmoap_flwr.methods.parts.moments import class_means, class_sums, second_moments
from pfedmoap_flwr.runs import checkpoint
from support.federation import Exchange, Federate, make_method, make_work, rounds
from support.tiny import NUM_CLIENTS, TINY

KINDS = ("lda", "nb", "qda")


def gh_ofl(head: str = "lda") -> Any:
    """The method with one of its heads."""
    settings = config.parse({**TINY, "method": "gh_ofl", "gh_ofl.head": head})
    made = make_method("gh_ofl")
    return type(made)(settings, settings.own, made.clip, made.task)


def made_up(d: int = 6, n: int = 90, n_classes: int = 4) -> tuple[Tensor, Tensor]:
    """Images of classes with different means and shapes, not of unit length; in float64."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % n_classes
    shapes = torch.eye(d) + 0.3 * torch.randn(n_classes, d, d, generator=generator) / d**0.5
    centres = 3 * torch.randn(n_classes, d, generator=generator).double()
    noise = torch.randn(n, d, generator=generator).double()
    return centres[labels] + torch.einsum("nd,nde->ne", noise, shapes[labels].double()), labels


def logits_of(head: dict[str, Tensor], x: Tensor) -> Tensor:
    """The classifier on images x (n, d), class by class."""
    found = []
    for c in range(len(head["bias"])):
        logit = head["bias"][c] + x @ head["weight"][c]
        if "curvature" in head:
            curvature = head["curvature"][c]
            full = torch.diag(curvature) if curvature.ndim == 1 else curvature
            logit = logit - torch.einsum("nd,de,ne->n", x, full, x) / 2
        found.append(logit)
    return torch.stack(found, dim=1)


def fitted(kind: str, x: Tensor, labels: Tensor, share: float = 0.0) -> dict[str, Tensor]:
    counts, sums = class_sums(x, labels, 4)
    moment = second_moments(x, labels, 4, kind)
    return fit(kind, counts, class_means(counts, sums), moment, share)


def test_16_nb_is_scikit_learns() -> None:
    x, labels = made_up()
    ours = logits_of(fitted("nb", x, labels), x).log_softmax(-1)
    theirs = GaussianNB(var_smoothing=0).fit(x.numpy(), labels.numpy())
    expected = torch.from_numpy(theirs.predict_log_proba(x.numpy()))
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["lda", "qda"])
@pytest.mark.parametrize("share", [0.0, 0.05, 1.0])
def test_16_lda_and_qda_are_gaussian_densities(kind: str, share: float) -> None:
    x, labels = made_up()
    means = torch.stack([x[labels == c].mean(0) for c in range(4)])
    centred = x - means[labels]
    log_prior = (labels.bincount().double() / len(x)).log()
    identity = torch.eye(6).double()
    expected = []
    for c in range(4):
        of = centred if kind == "lda" else centred[labels == c]
        covariance = of.t() @ of / (len(of) - (4 if kind == "lda" else 1))
        covariance = (1 - share) * covariance + (share * covariance.trace() / 6 + 1e-6) * identity
        density = torch.distributions.MultivariateNormal(means[c], covariance)
        expected.append(log_prior[c] + density.log_prob(x))
    ours = logits_of(fitted(kind, x, labels, share), x).log_softmax(-1)
    torch.testing.assert_close(ours, torch.stack(expected, 1).log_softmax(-1), rtol=1e-6, atol=1e-6)


def test_the_scatter_is_within_the_classes_not_the_total_one() -> None:
    x, labels = made_up()
    counts, sums = class_sums(x, labels, 4)
    found = scatter(counts, class_means(counts, sums), x.t() @ x)
    centred = x - torch.stack([x[labels == c].mean(0) for c in range(4)])[labels]
    torch.testing.assert_close(found, centred.t() @ centred)
    total = x - x.mean(0)
    assert (found - total.t() @ total).abs().max() > 10


def test_shrinking_keeps_the_trace() -> None:
    covariance = torch.diag(torch.tensor([1.0, 3.0, 8.0])).double()
    expected = torch.diag(torch.tensor([0.75 + 1, 2.25 + 1, 6 + 1])).double()
    ridge = 1e-6 * torch.eye(3).double()
    torch.testing.assert_close(shrunk(covariance, 0.25), expected + ridge)


@pytest.mark.parametrize("kind", KINDS)
def test_how_images_are_divided_has_no_say(kind: str) -> None:
    x, labels = made_up(d=64)
    method = gh_ofl(kind)
    heads = []
    for parts in ([slice(0, 90)], [slice(0, 10), slice(10, 11), slice(11, 90)]):
        state = method.start()
        uploads = {}
        for i, part in enumerate(parts):
            images = Split(x[part].float(), labels[part])
            uploads[i] = Upload(method.upload(make_work(method, method.build(), images)), 1)
        method.merge(state, uploads)
        (sent,) = method.send(state, [5], train=False).values()
        heads.append(method.build())
        heads[-1].load(sent)
    logits = [head(x.float()) for head in heads]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-3, atol=1e-1)
    # The head computes in float32 what the density is in float64
    expected = logits_of(fitted(kind, x, labels, 0.05), x)
    assert (logits[0].argmax(1) == expected.argmax(1)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_without_images_is_never_chosen_and_nothing_is_infinite(kind: str) -> None:
    x, labels = made_up(d=64)
    known = labels != 2
    method = gh_ofl(kind)
    state = method.start()
    images = Split(x[known].float(), labels[known])
    one = Split(x[:1].float(), torch.tensor([3]))
    works = [make_work(method, method.build(), split) for split in (images, one)]
    method.merge(state, {i: Upload(method.upload(work), 1) for i, work in enumerate(works)})
    head = method.build()
    head.load(method.send(state, [0], train=False)[0])
    logits = head(x.float())
    assert logits.isfinite().all()
    assert not (logits[known].argmax(1) == 2).any()


def test_before_any_statistics_it_is_zero_shot_clip() -> None:
    method = gh_ofl()
    assert method.send(method.start(), [0, 1], train=True) == {0: {}, 1: {}}
    images = torch.randn(20, 64)
    plain = make_method("zeroshot").build()(images)
    assert torch.equal(method.build()(images).argmax(1), plain.argmax(1))


def test_a_client_counts_once_and_a_late_one_is_added() -> None:
    method = gh_ofl()
    x, labels = made_up(d=64)
    parts = [Split(x[i::3].float(), labels[i::3]) for i in range(3)]
    uploads = {
        i: Upload(method.upload(make_work(method, method.build(), part)), len(part))
        for i, part in enumerate(parts)
    }
    at_once, late = ServerState({}), ServerState({})
    method.merge(at_once, uploads)
    method.merge(late, {0: uploads[0], 2: uploads[2]})
    method.merge(late, {0: uploads[0], 1: uploads[1]})
    assert late.extra["counts"].sum() == 90
    torch.testing.assert_close(late.extra, at_once.extra)
    before = {name: tensor.clone() for name, tensor in late.extra.items()}
    method.merge(late, uploads)
    torch.testing.assert_close(late.extra, before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_one_round_is_enough(kind: str, federate: Federate, wire: list[Exchange]) -> None:
    run = federate(method="gh_ofl", num_server_rounds=3, flat={"gh_ofl.head": kind})
    names = {"weight", "bias"} | ({"curvature"} if kind != "lda" else set())
    second = {"lda": (64, 64), "nb": (4, 64), "qda": (4, 64, 64)}[kind]
    for exchange in wire:
        first = exchange.round == 0 or (exchange.kind, exchange.round) == ("train", 1)
        assert exchange.down.keys() == (set() if first else names)
        if exchange.kind == "train":
            assert exchange.up.keys() == {"counts", "sums", "moments"}
            assert exchange.up["moments"].shape == second
    start, *later = rounds(run)
    assert later[0]["clients"] == later[1]["clients"] == later[2]["clients"]
    assert later[0]["clients"] != start["clients"]
    assert all(record["train_loss"] is None for record in later)
    for numbers in later[0]["clients"].values():
        assert numbers["personal-accuracy"] == numbers["global-accuracy"]
    assert sorted(checkpoint.load(run.path).pool) == list(range(NUM_CLIENTS))


def test_a_head_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UsageError, match="must be one of lda, nb, qda"):
        gh_ofl("svm")
