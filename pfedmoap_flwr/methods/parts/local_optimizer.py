"""The settings of `optimizer` in a method: how it is made with them, whether they have a say."""

from typing import Any

import torch

from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.base import Method, Split, Work
from pfedmoap_flwr.methods.parts.amsgrad import AMSGrad
from pfedmoap_flwr.methods.parts.averaged_moments import AveragedMoments
from pfedmoap_flwr.methods.parts.averaging import takes_mean
from pfedmoap_flwr.methods.settings import LearningSettings


def stepping(kind: type[Method[Any, Any]], settings: LearningSettings) -> type[Method[Any, Any]]:
    """Return the class of a method, with moments that travel where its steps are AMSGrad's."""
    if settings.optimizer.name != "amsgrad" or issubclass(kind, AveragedMoments):
        return kind
    return type(kind.__name__, (AveragedMoments, kind), {"__module__": kind.__module__})


def check_say(method: Method[Any, Any]) -> None:
    """Raise UsageError for settings of `optimizer` that would change nothing, or not be averaged.

    They say what `Method.optimizer` returns. A method may add to that, as noise to every step; one
    that brings an optimizer of its own keeps it.
    """
    said, name = method.settings.optimizer, type(method).__name__
    for field, value in said.of_sgd().items():
        if not _moves_by(method, torch.optim.SGD):
            key = field.replace("_", "-")
            raise UsageError(
                f"setting optimizer.{key}={value!r} has no say in {name}, whose steps here are not "
                f"those of SGD; leave optimizer.{key} out"
            )
    if said.name == "method":
        return
    if not _moves_by(method, AMSGrad):
        reason = "which has an optimizer of its own, or trains nothing"
    elif not takes_mean(method):
        reason = "which does not average what clients upload, and so not the moments either"
    elif not moved(method) & method.shared(method.build()).keys():
        reason = "whose clients do not train what they upload: there are no moments of it"
    else:
        return
    raise UsageError(
        f"setting optimizer.name={said.name!r} cannot be used with {name}, {reason}; "
        "use optimizer.name=method"
    )


def _moves_by(method: Method[Any, Any], kind: type[torch.optim.Optimizer]) -> bool:
    """Tell whether a method's optimizer is of this very class."""
    head, moving = method.build(), moved(method)
    groups = [
        {"name": name, "params": [parameter]}
        for name, parameter in head.named_parameters()
        if name in moving
    ]

    def nothing(split: str) -> Split:
        raise RuntimeError(f"no {split} images are here")

    # A method that trains nothing has no groups, which PyTorch refuses
    return bool(groups) and type(method.optimizer(Work(0, 1, head, nothing, {}), groups)) is kind


def moved(method: Method[Any, Any]) -> set[str]:
    """Return the names of the parameters that some phase of a fresh head moves."""
    return {name for _, names in method.schedule(method.build(), 1) for name in names}
