"""What a clinic asks of a classifier: metrics of one client's test images, with intervals.

Everything is of torchmetrics. Names: "f1" is the mean over classes, "f1.3" of class 3, "f1.low" and
"f1.high" bound the middle 95 % of resamplings of the mean. Shapes: n images, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

OF_CLASSES = ("auroc", "f1", "sensitivity")
"""Those that each class has: one against the rest."""
COUNTS = ("few", "withheld")
"""Beside metrics: how many classes have too few images, and how many no F1 and sensitivity."""
MOST_CLASSES = 100
"""Above it a confusion matrix is too large to travel with every answer."""
BINS = 15  # of ece, equally wide, as Guo et al. (2017) have it
ENDS = (0.025, 0.975)

Scores = dict[str, float | int | list[int]]


@dataclass(frozen=True, eq=False)
class Asked:
    """What is to be measured.

    metrics: "accuracy", "auroc", "f1", "sensitivity", "ece". min_count: no count of images from 1
    to below it can be worked out of what is returned for a class. resamplings: for the intervals;
    0: none.
    """

    metrics: Sequence[str]
    min_count: int = 0
    resamplings: int = 0


def score(
    logits: Tensor,
    labels: Tensor,
    asked: Asked,
    generator: torch.Generator,
    groups: Tensor | None = None,
) -> Scores:
    """Return the scores of logits (n, C) and labels (n,); without images, none.

    groups: (n,) numbers of groups, as patients, which are resampled whole.

    A class without test images has no scores. With min_count no class has any that has fewer images
    ("few" of them), nor F1 and sensitivity where its right or wrong images or those wrongly taken
    for it are so few ("withheld"). A mean is over the classes with enough images, and there is none
    where one of them is withheld: what is left is no fair sample. Where the matrix of confusion
    would show a small count, it is left out whole.
    """
    logits, labels = logits.detach().float().cpu(), labels.cpu()
    if not len(labels):
        return {}
    shares, confusion = logits.softmax(dim=1), _confusion(logits, labels)
    present = (confusion.sum(dim=1) > 0).nonzero().flatten().tolist()
    enough, shown = _enough(confusion, present, asked.min_count)
    found: Scores = {}
    averaged: dict[str, list[int]] = {}
    for name, values in _of_classes(shares, labels, asked.metrics).items():
        told = [c for c in (enough if name == "auroc" else shown) if not values[c].isnan()]
        found |= {f"{name}.{c}": float(values[c]) for c in told}
        if told and (name == "auroc" or shown == enough):
            averaged[name] = told
            found[name] = float(values[told].mean())
    found |= {n: float(v) for n, v in _overall(shares, labels, asked.metrics).items()}
    if asked.resamplings:
        found |= _intervals(shares, labels, asked, averaged, generator, groups)
    found |= {"few": len(present) - len(enough), "withheld": len(present) - len(shown)}
    small = (confusion > 0) & (confusion < asked.min_count)
    if not small.any() and shown == present and logits.shape[1] <= MOST_CLASSES:
        found["confusion"] = confusion.flatten().tolist()
    return found


def _confusion(logits: Tensor, labels: Tensor) -> Tensor:
    """Return counts (C, C): rows are the classes of images, columns what they were taken for."""
    from torchmetrics.functional import classification as tm

    classes = logits.shape[1]
    return tm.multiclass_confusion_matrix(logits.argmax(dim=1), labels, classes)


def _enough(
    confusion: Tensor, present: Sequence[int], min_count: int
) -> tuple[list[int], list[int]]:
    """Return the classes with enough images, and those of them without any small count."""
    right, images, taken = confusion.diag(), confusion.sum(dim=1), confusion.sum(dim=0)
    others = confusion.sum() - images
    few = (images < min_count) | (others < min_count)
    counts = torch.stack([right, images - right, taken - right, others - (taken - right)])
    small = few | ((counts > 0) & (counts < min_count)).any(dim=0)
    enough = _never_all_but_one([c for c in present if not few[c]], present, images)
    shown = [c for c in enough if not small[c]]
    return enough, _never_all_but_one(shown, present, images)


def _never_all_but_one(shown: list[int], present: Sequence[int], images: Tensor) -> list[int]:
    """Return what is shown, less another class where just one is not.

    With the number of all images that one's counts could be worked out.
    """
    if shown and len(present) - len(shown) == 1:
        shown.remove(min(shown, key=lambda c: int(images[c])))
    return shown


def _of_classes(shares: Tensor, labels: Tensor, metrics: Sequence[str]) -> dict[str, Tensor]:
    """Return values (C,) of the metrics that classes have."""
    from torchmetrics.functional import classification as tm

    classes, taken = shares.shape[1], shares.argmax(dim=1)
    found = {}
    if "f1" in metrics:
        found["f1"] = tm.multiclass_f1_score(taken, labels, classes, average=None)
    if "sensitivity" in metrics:
        found["sensitivity"] = tm.multiclass_recall(taken, labels, classes, average=None)
    if "auroc" in metrics:
        values = torch.full((classes,), torch.nan)
        for c in labels.unique().tolist():
            # There is no area where all images are of one class
            if bool((labels != c).any()):
                values[c] = tm.binary_auroc(shares[:, c], (labels == c).long())
        found["auroc"] = values
    return found


def _overall(shares: Tensor, labels: Tensor, metrics: Sequence[str]) -> dict[str, Tensor]:
    """Return the metrics of all images together."""
    from torchmetrics.functional import classification as tm

    found, classes = {}, shares.shape[1]
    if "accuracy" in metrics:
        found["accuracy"] = (shares.argmax(dim=1) == labels).float().mean()
    if "ece" in metrics:
        found["ece"] = tm.multiclass_calibration_error(shares, labels, classes, n_bins=BINS)
    return found


def _intervals(
    shares: Tensor,
    labels: Tensor,
    asked: Asked,
    averaged: dict[str, list[int]],
    generator: torch.Generator,
    groups: Tensor | None,
) -> dict[str, float]:
    """Return the bounds of each mean and of what is measured of all images, by a bootstrap.

    averaged: the classes of each mean.
    """
    draws = [_resampled(len(labels), generator, groups) for _ in range(asked.resamplings)]
    simple = [name for name in asked.metrics if name != "auroc"]
    values: dict[str, list[Tensor]] = {}
    for rows in draws:
        drawn = shares[rows], labels[rows]
        found = _overall(*drawn, simple)
        for name, each in _of_classes(*drawn, [n for n in simple if n in averaged]).items():
            there = [c for c in averaged[name] if bool((drawn[1] == c).any())]
            found[name] = each[there].mean()
        for name, value in found.items():
            values.setdefault(name, []).append(value)
    if classes := averaged.get("auroc"):
        times = torch.stack([torch.bincount(rows, minlength=len(labels)) for rows in draws])
        each_area = [areas(shares[:, c], labels == c, times) for c in classes]
        values["auroc"] = list(torch.stack(each_area).nanmean(dim=0))
    bounds: dict[str, float] = {}
    for name, drawn_values in values.items():
        kept = torch.stack(drawn_values).double()
        kept = kept[~kept.isnan()]
        if len(kept):
            low, high = torch.quantile(kept, torch.tensor(ENDS, dtype=torch.float64)).tolist()
            bounds |= {f"{name}.low": low, f"{name}.high": high}
    return bounds


def _resampled(count: int, generator: torch.Generator, groups: Tensor | None) -> Tensor:
    """Return the rows of one resampling: as many images, or groups, as there are."""
    if groups is None:
        return torch.randint(count, (count,), generator=generator)
    names = groups.unique()
    drawn = names[torch.randint(len(names), (len(names),), generator=generator)]
    return torch.cat([(groups == name).nonzero().flatten() for name in drawn])


def areas(scores: Tensor, positive: Tensor, times: Tensor) -> Tensor:
    """Return the area under the ROC curve (R,) of each of R resamplings of scores (n,).

    times: (R, n), how often each image was drawn. An area is the share of pairs in which the
    positive image scores higher, half for a tie; none where a kind was not drawn. A library would
    sort anew for each resampling.
    """
    _, level = scores.unique(return_inverse=True)
    shape = len(times), int(level.max()) + 1
    weights = times.double()
    of_levels = [
        torch.zeros(shape, dtype=torch.float64).index_add_(1, level, weights * kind)
        for kind in (positive, ~positive)
    ]
    pos, neg = of_levels
    below = neg.cumsum(dim=1) - neg / 2
    return (pos * below).sum(dim=1) / (pos.sum(dim=1) * neg.sum(dim=1))


def declared(metrics: Sequence[str], classes: int) -> dict[str, tuple[float, float]]:
    """Return the name of every metric that `score` may return, with the range of its number."""
    ended = [f"{name}{end}" for name in metrics for end in ("", ".low", ".high")]
    each = [f"{name}.{c}" for name in metrics if name in OF_CLASSES for c in range(classes)]
    return dict.fromkeys([*ended, *each], (0.0, 1.0))
