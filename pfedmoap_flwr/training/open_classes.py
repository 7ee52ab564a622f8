"""Heads measured on classes that nobody trained (base-to-new: Zhou et al., CVPR 2022, CoCoOp)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from pfedmoap_flwr.data.federated import Task
from pfedmoap_flwr.methods.base import Method, Split, Work, listed
from pfedmoap_flwr.training.exchange import make_work

EXAMPLE_CLIENT = 0


class OtherClasses:
    """A method's heads, built anew for classes that nobody trained.

    What a head learned goes over by name. A tensor whose shape follows from the number of classes
    belongs to the trained ones: it stays as it starts if the method says that it may.

    Args:
        method: of the trained classes.
        task: the other classes, those that the data set holds back or those of another one.

    Raises:
        ValueError: some other tensor belongs to the trained classes, as a classifier's weights do.
    """

    def __init__(self, method: Method[Any, Any], task: Task) -> None:
        self.method = _with_task(method, task)
        # One class more shows what follows from their number, even where both parts are as large
        mine = method.task.classnames
        extra = next((name for name in task.classnames if name not in mine), "something else")
        more = _with_task(method, replace(method.task, classnames=(*mine, extra)))
        self.bound = _differing(method.build().state(), more.build().state())
        stuck = {name for name in self.bound if not listed(name, method.of_classes)}
        if stuck := stuck | _differing(_travels(method), _travels(more)):
            raise ValueError(f"{', '.join(sorted(stuck))} would be of other classes")

    def work(self, work: Work[Any]) -> Work[Any]:
        """Return the work of the same client with a head of the other classes, to be measured."""
        state = {n: t for n, t in work.head.state().items() if n not in self.bound}

        def no_images(name: str) -> Split:
            # The client's own labels mean other classes
            data = work.split(name)
            return Split(data.features[:0], data.labels[:0])

        return make_work(self.method, work.client_id, work.round, no_images, work.received, state)


def _with_task(method: Method[Any, Any], task: Task) -> Method[Any, Any]:
    return type(method)(method.settings, method.own, method.clip, task)


def _travels(method: Method[Any, Any]) -> dict[str, Tensor]:
    sent = method.send(method.start(), [EXAMPLE_CLIENT], train=False)[EXAMPLE_CLIENT]
    return {**sent, **method.reports()}


def _differing(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> set[str]:
    return {name for name in one if name not in other or one[name].shape != other[name].shape}
