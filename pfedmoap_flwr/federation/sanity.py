"""CLIP before any training comes first: where it only guesses, labels or class names are wrong."""

import logging
import math
from collections.abc import Mapping
from statistics import median_low

from pfedmoap_flwr.config import EvalSettings
from pfedmoap_flwr.errors import RunFailed
from pfedmoap_flwr.federation.handshake import Card
from pfedmoap_flwr.federation.messages import accuracy_name

logger = logging.getLogger("flwr.pfedmoap")

SURE, SURER = 2.0, 3.0
"""Standard deviations above what guessing gives, and below what a model twice as good does."""


def check(
    settings: EvalSettings, clients: Mapping[int, Mapping[str, float]], cards: Mapping[int, Card]
) -> None:
    """Say how good CLIP is before any training.

    clients: their accuracies, by name. Raises RunFailed where CLIP only guesses.
    """
    name = accuracy_name("zeroshot", settings.split)
    found = {i: measured[name] for i, measured in clients.items() if name in measured}
    sizes = {i: cards[i].sizes[settings.split] for i in found}
    if not any(sizes.values()):
        return
    classes = len(next(iter(cards.values())).task.classnames)
    right, images = pooled(found, sizes)
    said = line(right, images, classes)
    logger.info("%s", said)
    if settings.below_chance == "stop" and only_guesses(right, images, classes):
        raise RunFailed(
            f"{said}: wrong labels or wrong class names, in most cases (see `pfedmoap data show` "
            "and data.classnames), or this CLIP knows no such images; eval.below-chance=go-on runs "
            "nevertheless"
        )


def pooled(accuracies: Mapping[int, float], sizes: Mapping[int, int]) -> tuple[float, int]:
    """Return how many images of all clients are right, and how many there are.

    accuracies, sizes: by client. A client counts with as many images as the median one at the most,
    so that no single one can speak for all.
    """
    most = median_low(sizes[i] for i in accuracies)
    counted = {i: min(sizes[i], most) for i in accuracies}
    return sum(accuracies[i] * count for i, count in counted.items()), sum(counted.values())


def only_guesses(right: float, images: int, classes: int) -> bool:
    """Tell whether so many right answers are what guessing gives.

    They are where guessing explains them, and a model that is right twice as often does not. Among
    few images neither can be told: then it is not said.
    """
    chance = 1 / classes
    twice = min(1.0, 2 * chance)
    guessed, better = chance * images, twice * images
    most_guessed = guessed + SURE * math.sqrt(guessed * (1 - chance))
    return right <= min(most_guessed, better - SURER * math.sqrt(better * (1 - twice)))


def line(right: float, images: int, classes: int) -> str:
    """Return what there is to say of it, in words."""
    return (
        f"zero-shot CLIP gets {right / images:.1%} of {images:,} images right; guessing among "
        f"{classes} classes gets {1 / classes:.1%}"
    )
