"""Fed-MP's test time and weights: the public code's steps, and what is ours, by hand."""

import math

import pytest
import torch
from torch.nn import functional as F

from pfedmoap_flwr.methods.parts.prototypes import Prototypes
from pfedmoap_flwr.methods.parts.similarity import not_negative, similarities
from support.oracle import numbers, oracle

VECTOR = oracle("fedmp_adapter")
STREAM = VECTOR["test_time"]
TEXT, IMAGES = numbers(STREAM["text"]), numbers(STREAM["images"])


def test_16_a_stream_is_followed_as_in_the_public_code() -> None:
    prototypes = Prototypes(TEXT, STREAM["uncertainty"], "all")
    assert prototypes.largest == pytest.approx(STREAM["threshold"], rel=1e-6)
    for image, step in zip(IMAGES, STREAM["steps"], strict=True):
        logits = prototypes.classify(image, STREAM["logit_scale"])
        torch.testing.assert_close(logits, numbers(step["logits"]), rtol=1e-6, atol=1e-5)
        assert logits.argmax() == step["prediction"]
        assert prototypes.counts.tolist() == step["counts"]
    means = numbers(STREAM["final_image_means"])
    torch.testing.assert_close(prototypes.means(), means, rtol=1e-6, atol=1e-7)
    again = Prototypes(TEXT, STREAM["uncertainty"], "all").follow(IMAGES, STREAM["logit_scale"])
    expected = numbers([step["logits"] for step in STREAM["steps"]])
    torch.testing.assert_close(again, expected, rtol=1e-6, atol=1e-5)


def test_with_an_image_of_every_class_both_ways_are_one() -> None:
    whole = [Prototypes(TEXT, 0.1, available) for available in ("all", "each")]
    for prototypes in whole:
        prototypes.counts = torch.tensor([1.0, 2.0, 1.0, 3.0]).double()
        prototypes.sums = numbers(STREAM["final_image_means"]) * prototypes.counts[:, None]
    one, other = (p.classify(IMAGES[4], 100.0) for p in whole)
    torch.testing.assert_close(one, other)


def test_a_class_without_an_image_gets_the_mean_of_the_others() -> None:
    prototypes = Prototypes(TEXT, 0.1, "each")
    assert not prototypes.means().any()
    prototypes.counts = torch.tensor([2.0, 0.0, 1.0, 0.0]).double()
    prototypes.sums[0], prototypes.sums[2] = 2 * IMAGES[0], IMAGES[1]
    neutral = (IMAGES[0] + IMAGES[1]) / 2
    expected = torch.stack([IMAGES[0], neutral, IMAGES[1], neutral])
    torch.testing.assert_close(prototypes.means(), expected)


def test_the_first_class_with_an_image_does_not_take_all_others() -> None:
    # Images lie near each other and far from texts: cosines about 0.97 and below 0.25
    text = F.normalize(torch.eye(6)[:3].double(), dim=-1)
    kinds = 0.25 * torch.eye(6)[:3].double() + torch.eye(6)[5].double()
    images = F.normalize(kinds[[0, 0, 1, 2, 1, 2, 0]], dim=-1)
    found = Prototypes(text, 0.5, "each").follow(images, 100.0)
    assert found.argmax(-1).tolist() == [0, 0, 1, 2, 1, 2, 0]
    # With the mean of class 0 alone and no more, class 0 would win
    alone = text.clone()
    alone[0] += images[0]
    assert (images @ alone.t()).argmax(-1).tolist() == [0] * 7


def test_an_image_that_is_not_sure_teaches_nothing() -> None:
    text = torch.eye(2).double()
    image = F.normalize(torch.tensor([1.0, 0.9]).double(), dim=0)
    p = torch.softmax(10 * image, 0)
    entropy = -(p * p.log()).sum().item()
    for u, kept in ((entropy / math.log(2) - 0.01, 0), (entropy / math.log(2) + 0.01, 1)):
        prototypes = Prototypes(text, u, "each")
        prototypes.classify(image, 10.0)
        assert prototypes.counts.tolist() == [kept, 0]
        torch.testing.assert_close(prototypes.sums[0], kept * image)


def test_16_similarities_are_those_of_the_public_code() -> None:
    said = VECTOR["weights"]
    sums = {i: numbers(text).sum(0) for i, text in enumerate(said["client_text"])}
    found = similarities(numbers(said["global_text"]), sums)
    assert list(found.values()) == pytest.approx(said["similarity"], abs=1e-4)


def test_weights_below_zero_are_zero_and_none_left_is_all_alike() -> None:
    assert not_negative({0: 0.5, 3: -0.2, 7: 0.0}) == {0: 0.5, 3: 0.0, 7: 0.0}
    assert not_negative({0: -0.5, 3: -0.2}) == {0: 1.0, 3: 1.0}
