"""What a class makes of the logits or the features of its names (prompt.verbalizer).

Shapes: C classes, V names in all, d embedding width.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pfedmoap_flwr.clip.names import EachName, NamesEncoder, WeighedNames
from pfedmoap_flwr.clip.text import PromptEncoder
from pfedmoap_flwr.errors import UsageError


def verbalized(
    encoder: PromptEncoder | NamesEncoder, verbalizer: str, weights: Callable[[], Tensor]
) -> PromptEncoder | NamesEncoder:
    """Return an encoder's own form for a verbalizer: "mean", "max" or "weights".

    weights: gives what is learned of the names, (V,).

    Raises UsageError where no class has several names.
    """
    if verbalizer == "mean":
        return encoder
    if not isinstance(encoder, NamesEncoder):
        raise UsageError(
            f"setting prompt.verbalizer={verbalizer!r}: no class of prompt.names has several names"
        )
    if verbalizer == "max":
        return EachName(encoder.encoder, encoder.counts)
    return WeighedNames(encoder, weights)


def check_best(kind: type[Any], plain: type[Any]) -> None:
    """Raise UsageError where the logits of a kind of head are not, name by name, those of `plain`.

    "max" takes the largest logit of a class's names. A head with text features or logits of another
    kind, as a gate's, has one for a class alone.
    """
    if kind.encode is not plain.encode or kind.classify is not plain.classify:
        raise UsageError(
            f"setting prompt.verbalizer='max': {kind.__name__} has no logit for each name; use "
            "prompt.verbalizer=mean or weights"
        )
