"""Metrics of a clinic: scikit-learn's numbers, intervals, and what small counts leave out."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from torch import Tensor

from pfedmoap_flwr.config import METRICS
from pfedmoap_flwr.training.scores import Asked, areas, declared, score

ALL = Asked(METRICS)


def drawn(images: int = 150, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits with ties, and labels of which some are guessed right."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=rng)
    logits = torch.randn(images, classes, generator=rng).mul(2).round() / 2
    logits[torch.arange(images), labels] += 1.0
    return logits, labels


def numbers(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("classes", [2, 4])
def test_the_numbers_are_those_of_scikit_learn(classes: int) -> None:
    logits, labels = drawn(classes=classes)
    found: Any = score(logits, labels, ALL, numbers())
    shares, taken = logits.softmax(dim=1).numpy(), logits.argmax(dim=1).numpy()
    true = labels.numpy()
    one_hot = np.eye(classes)[true]
    expected = {
        "accuracy": sk.accuracy_score(true, taken),
        "f1": sk.f1_score(true, taken, average="macro"),
        "sensitivity": sk.recall_score(true, taken, average="macro"),
        "auroc": sk.roc_auc_score(one_hot, shares, average="macro"),
    }
    f1, recall = (f(true, taken, average=None) for f in (sk.f1_score, sk.recall_score))
    auroc = sk.roc_auc_score(one_hot, shares, average=None)
    for c in range(classes):
        expected |= {f"f1.{c}": f1[c], f"sensitivity.{c}": recall[c], f"auroc.{c}": auroc[c]}
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-6), name
    assert found["confusion"] == sk.confusion_matrix(true, taken).flatten().tolist()
    assert found["withheld"] == 0


def test_ece_is_the_sum_over_bins_by_hand() -> None:
    # Confidence 0.7 and 0.9: two of three right, one of two right
    shares = torch.tensor([[0.7, 0.3]] * 3 + [[0.1, 0.9]] * 2)
    labels = torch.tensor([0, 0, 1, 1, 0])
    found: Any = score(shares.log(), labels, Asked(("ece",)), numbers())
    assert found["ece"] == pytest.approx(3 / 5 * abs(2 / 3 - 0.7) + 2 / 5 * abs(1 / 2 - 0.9))


def test_a_class_without_images_has_no_score() -> None:
    logits, labels = drawn(classes=4)
    labels[labels == 2] = 1
    found: Any = score(logits, labels, ALL, numbers())
    assert not [name for name in found if name.endswith(".2")]
    taken = logits.argmax(dim=1)
    recalls = [float((taken[labels == c] == c).float().mean()) for c in (0, 1, 3)]
    assert found["sensitivity"] == pytest.approx(np.mean(recalls))
    assert score(logits[:0], labels[:0], ALL, numbers()) == {}


def test_images_of_one_class_have_no_area() -> None:
    logits, _ = drawn(classes=4)
    found: Any = score(logits, torch.zeros(len(logits), dtype=torch.long), ALL, numbers())
    assert not [name for name in found if name.startswith("auroc")]
    taken = logits.argmax(dim=1)
    assert found["sensitivity"] == pytest.approx(float((taken == 0).float().mean()))


@pytest.mark.parametrize("positives", [0.1, 0.5])
def test_areas_of_resamplings_are_those_of_scikit_learn(positives: float) -> None:
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 9, 60) / 9, rng.random(60) < positives
    rows = rng.integers(0, 60, (20, 60))
    times = np.stack([np.bincount(each, minlength=60) for each in rows])
    found = areas(torch.tensor(scores), torch.tensor(positive), torch.tensor(times))
    theirs = [sk.roc_auc_score(positive[each], scores[each]) for each in rows]
    np.testing.assert_allclose(found, theirs, atol=1e-12)


def test_an_interval_holds_what_scipy_says_of_a_share() -> None:
    from scipy import stats

    logits, labels = drawn(images=400)
    found: Any = score(logits, labels, Asked(METRICS, resamplings=500), numbers())
    right = (logits.argmax(dim=1) == labels).numpy().astype(float)
    theirs = stats.bootstrap(
        (right,), np.mean, n_resamples=2000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    ours = found["accuracy.low"], found["accuracy.high"]
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.01)
    for name in METRICS:
        assert found[f"{name}.low"] < found[name] < found[f"{name}.high"] or name == "ece"
    again = score(logits, labels, Asked(METRICS, resamplings=500), numbers())
    assert again == found
    assert score(logits, labels, Asked(METRICS, resamplings=500), numbers(1)) != found


def test_patients_are_resampled_whole() -> None:
    logits, labels = drawn(images=20)
    # Each patient has ten copies of one image: it is worth no more than that image
    many = logits.repeat_interleave(10, dim=0), labels.repeat_interleave(10)
    groups = torch.arange(20).repeat_interleave(10)
    asked = Asked(("accuracy",), resamplings=400)
    one, alone = (score(logits, labels, asked, numbers()), score(*many, asked, numbers()))
    whole = score(*many, asked, numbers(), groups)

    def width(found: Any) -> float:
        return found["accuracy.high"] - found["accuracy.low"]

    assert width(whole) == pytest.approx(width(one), abs=0.1)
    assert width(alone) < width(one) / 2


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("classes", [2, 5])
def test_no_small_count_can_be_worked_out(seed: int, classes: int) -> None:
    logits, labels = drawn(images=40 * classes, classes=classes, seed=seed)
    labels[labels == 0] = torch.where(torch.rand(int((labels == 0).sum())) < 0.8, 1, 0)
    least = 6
    found: Any = score(logits, labels, Asked(METRICS, min_count=least, resamplings=3), numbers())
    taken = logits.argmax(dim=1)
    shown = {
        int(name.split(".")[1]) for name in found if name.startswith("f1.") and name[-1].isdigit()
    }
    for c in shown:
        hits = int(((taken == c) & (labels == c)).sum())
        counts = [int((labels == c).sum()), int((taken == c).sum())]
        for count in (hits, counts[0] - hits, counts[1] - hits):
            assert count == 0 or count >= least
        assert counts[0] >= least
    present = len(labels.unique())
    assert found["withheld"] == present - len(shown)
    assert found["withheld"] != 1
    assert found["few"] != 1
    areas_of = {int(name.split(".")[1]) for name in found if re.fullmatch(r"auroc\.\d+", name)}
    assert found["few"] == present - len(areas_of)
    assert all(int((labels == c).sum()) >= least for c in areas_of)
    if "confusion" in found:
        assert all(count == 0 or count >= least for count in found["confusion"])
        assert found["withheld"] == 0
    # A mean of what happens to be shown would be of the classes that are all wrong or all right
    for name in ("f1", "sensitivity"):
        assert (name in found) == (f"{name}.low" in found) == (shown == areas_of != set())
    if "f1" in found:
        assert found["f1"] == pytest.approx(np.mean([found[f"f1.{c}"] for c in sorted(shown)]))


def test_what_is_withheld_by_hand() -> None:
    # Class 0: 10 images, 8 right, 2 taken for 1. Class 1: 10, all right. Class 2: 20, all right
    labels = torch.tensor([0] * 10 + [1] * 10 + [2] * 20)
    taken = torch.tensor([0] * 8 + [1] * 12 + [2] * 20)
    logits = torch.eye(3)[taken] * 5
    found = score(logits, labels, Asked(METRICS, min_count=3), numbers())
    assert "sensitivity.0" not in found  # 2 wrong
    assert "f1.1" not in found  # 2 wrongly taken for it
    assert found["sensitivity.2"] == 1
    assert (found["few"], found["withheld"]) == (0, 2)
    assert "sensitivity" not in found
    assert "confusion" not in found
    assert {"auroc", "auroc.0", "auroc.1", "auroc.2", "accuracy"} <= found.keys()
    found = score(logits, labels, Asked(METRICS, min_count=2), numbers())
    assert found["confusion"] == [8, 2, 0, 0, 10, 0, 0, 0, 20]
    assert found["sensitivity"] == pytest.approx((0.8 + 1 + 1) / 3)
    # Class 0 has 8 images and would be alone: class 1, the next smallest, goes with it
    found = score(logits[2:], labels[2:], Asked(METRICS, min_count=9), numbers())
    assert (found["few"], found["withheld"]) == (2, 2)
    assert {"auroc.2", "auroc"} <= found.keys()
    assert not {"auroc.0", "auroc.1", "confusion"} & found.keys()


def test_all_that_is_returned_was_declared() -> None:
    logits, labels = drawn()
    found: Any = score(logits, labels, Asked(METRICS, resamplings=5), numbers())
    ranges = declared(METRICS, 4)
    assert found.keys() - ranges.keys() == {"few", "withheld", "confusion"}
    for name in found.keys() & ranges.keys():
        low, high = ranges[name]
        assert low <= found[name] <= high
