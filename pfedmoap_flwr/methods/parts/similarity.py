"""How near clients' classes are to all classes, as Fed-MP weighs them (arXiv 2404.01232)."""

from collections.abc import Mapping

from torch import Tensor


def similarities(text_features: Tensor, classes: Mapping[int, Tensor]) -> dict[int, float]:
    """Return s_k = SUM_g SUM_l t_g . t'_l / (C sqrt C) of clients, by client id.

    text_features (C, d): the t_g. classes: SUM_l t'_l (d,) of each client, which is enough to know.
    """
    common = text_features.double().sum(0) / len(text_features) ** 1.5
    return {i: (common @ own.double()).item() for i, own in classes.items()}


def not_negative(weights: Mapping[int, float]) -> dict[int, float]:
    """Return weights with 0 for those below; all the same where none is left.

    As a plain ratio, negative weights would push away from a client, and a sum near 0 explode.
    """
    kept = {i: max(0.0, weight) for i, weight in weights.items()}
    return kept if any(kept.values()) else dict.fromkeys(kept, 1.0)
