"""Flower's own rules for what is shared, in place of the mean: FedAdam, Krum, the median, ...

Flower's code does the arithmetic. A strategy of Flower's is made anew for each round; what it
remembers, such as Adam's moments, lies in the server's state between rounds, and so in the
checkpoint.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import strategy
from flwr.serverapp.exception import AppExitException
from torch import Tensor

from pfedmoap_flwr.config import ServerSettings
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.federation.messages import to_arrays, to_tensors
from pfedmoap_flwr.methods.base import Method, ServerState, Upload
from pfedmoap_flwr.methods.parts.averaging import takes_mean
from pfedmoap_flwr.methods.parts.mean import average

FLOWERS: dict[str, type[strategy.FedAvg]] = {
    kind.__name__.lower(): kind
    for kind in (
        *(strategy.FedAvgM, strategy.FedAdagrad, strategy.FedAdam, strategy.FedYogi),
        *(strategy.FedMedian, strategy.FedTrimmedAvg),
        *(strategy.Krum, strategy.MultiKrum, strategy.Bulyan),
    )
}
# What Flower calls a setting of ours
PARAMETERS = {
    "eta": "lr",
    "server_learning_rate": "lr",
    "server_momentum": "momentum",
    "beta": "trim",
    "num_malicious_nodes": "malicious",
    "num_nodes_to_select": "selected",
}
MOMENTS = ("m_t", "v_t")


class FlowerRule:
    """A method's `combine` by one of Flower's strategies."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.kind = FLOWERS[settings.rule]
        takes = inspect.signature(self.kind).parameters
        given = {name: getattr(settings, field) for name, field in PARAMETERS.items()}
        if not settings.lr:
            given = {name: value for name, value in given.items() if PARAMETERS[name] != "lr"}
        self.options = {name: value for name, value in given.items() if name in takes}

    def __call__(self, state: ServerState, uploads: Mapping[int, Upload]) -> dict[str, Tensor]:
        """Return what is shared next. Raises UsageError where Flower's rule cannot be applied."""
        everywhere = [n for n in state.shared if all(n in u.tensors for u in uploads.values())]
        old = {name: state.shared[name] for name in everywhere}
        # What only some clients got, only some sent back; such rules want one from each
        means = average(uploads, {n: t for n, t in state.shared.items() if n not in old})
        return means | (self._combined(state, old, list(uploads.values())) if old else {})

    def _combined(
        self, state: ServerState, old: Mapping[str, Tensor], uploads: Sequence[Upload]
    ) -> dict[str, Tensor]:
        rule: Any = self.kind(**self.options)
        _remind(rule, old, state.extra)
        try:
            arrays, _ = rule.aggregate_train(state.round + 1, [_reply(old, u) for u in uploads])
        except (AppExitException, ValueError) as error:
            raise UsageError(f"setting server.rule={self.settings.rule!r}: {error}") from error
        if arrays is None:
            raise UsageError(
                f"setting server.rule={self.settings.rule!r}: it makes nothing of "
                f"{len(uploads)} uploads"
            )
        state.extra |= _memory(rule, old)
        # FedAdam and its kin give float64 back
        return {name: t.to(old[name].dtype) for name, t in to_tensors(arrays).items()}


def replace_mean(method: Method[Any, Any], settings: ServerSettings) -> None:
    """Let a method combine uploads by one of Flower's rules.

    Raises UsageError for a method that does not take the mean of uploads, where the rule would
    have no say.
    """
    if not takes_mean(method):
        raise UsageError(
            f"setting server.rule={settings.rule!r} has no say in {type(method).__name__}, which "
            "does not average what clients upload; use server.rule=average"
        )
    method.combine = FlowerRule(settings)  # type: ignore[method-assign]


def _reply(old: Mapping[str, Tensor], upload: Upload) -> Message:
    arrays = to_arrays({name: upload.tensors[name] for name in old})
    metrics = MetricRecord({"num-examples": upload.num_examples})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), 0, MessageType.TRAIN)


def _remind(rule: Any, old: Mapping[str, Tensor], extra: Mapping[str, Tensor]) -> None:
    """Give a fresh strategy the moments that the last round left in the server's state."""
    if isinstance(rule, strategy.FedAvgM):
        rule.current_arrays = to_arrays(old)
        if all(_key("momentum", name) in extra for name in old):
            rule.momentum_vector = [extra[_key("momentum", name)].numpy() for name in old]
    elif hasattr(rule, "m_t"):
        rule.current_arrays = {name: tensor.numpy() for name, tensor in old.items()}
        for moment in MOMENTS:
            if all(_key(moment, name) in extra for name in old):
                setattr(rule, moment, {name: extra[_key(moment, name)].numpy() for name in old})


def _memory(rule: Any, old: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the moments of a strategy after a round, for the server's state."""
    known: dict[str, Mapping[str, Any]] = {
        moment: getattr(rule, moment, None) or {} for moment in MOMENTS
    }
    if vector := getattr(rule, "momentum_vector", None):
        known["momentum"] = dict(zip(old, vector, strict=True))
    return {
        _key(moment, name): torch.from_numpy(np.array(array))
        for moment, arrays in known.items()
        for name, array in arrays.items()
    }


def _key(moment: str, name: str) -> str:
    return f"server.{moment}.{name}"
