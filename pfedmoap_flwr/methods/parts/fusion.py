"""Two classifiers of one image, of which the surer one weighs more (TOFA, arXiv 2511.16423)."""

from torch import Tensor


def surer(first: Tensor, second: Tensor) -> Tensor:
    """Return eta f_1 + (1 - eta) f_2 (B, C) of logits f (B, C).

    eta = p_1 / (p_1 + p_2) for each image, p = max softmax f.
    """
    sure, other = (f.softmax(-1).amax(-1, keepdim=True) for f in (first, second))
    eta = sure / (sure + other)
    return eta * first + (1 - eta) * second
