"""Differential privacy of what is uploaded: who may, the noise, and what was spent so far.

unit=client. What a client uploads is what it received plus its update. All tensors of the update
together are clipped to C, and get N(0, (z C)^2) in every entry, z the setting privacy.noise: at the
client, or, where=server, once in the sum of the updates of all n who were asked. A client that is
left out counts as one whose update is 0, and changes that sum by C at the most. So each round is
one Gaussian mechanism with sigma = z, for every client that was asked (parts/privacy.py).

unit=example: what a client learns is made private in its steps (parts/private_sgd.py).
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pfedmoap_flwr.config import Settings
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.base import Method, ServerState, Tensors, Upload, Work
from pfedmoap_flwr.methods.parts.averaging import needs_only_mean
from pfedmoap_flwr.methods.parts.local_optimizer import moved
from pfedmoap_flwr.methods.parts.privacy import (
    clipped_update,
    epsilon_after,
    gaussian,
    sums_within,
)
from pfedmoap_flwr.methods.settings import PrivacySettings
from pfedmoap_flwr.randomness import torch_generator

SUMS = "privacy.sums"
"""In the server's state: how many noised sums each client has been part of."""
OF_SINGLE_UPLOADS = ("fedmedian", "fedtrimmedavg", "krum", "multikrum", "bulyan")

logger = logging.getLogger("flwr.pfedmoap")


def check_privacy(method: Method[Any, Any], rule: str) -> None:
    """Raise UsageError where clipped and noised updates are nothing that a method can use.

    rule: the setting server.rule.
    """
    privacy = method.settings.privacy
    if privacy.unit == "client" and (reason := _unsuited(method, rule)):
        raise UsageError(
            f"setting privacy.unit={privacy.unit!r} cannot be used with {type(method).__name__}, "
            f"{reason}"
        )
    if privacy.unit != "none" and privacy.noise and not privacy.secret_noise:
        logger.warning(
            "noise is drawn from the seed, which whoever knows it can take off again: for "
            "experiments alone; in a deployment set privacy.secret-noise=true"
        )


def _unsuited(method: Method[Any, Any], rule: str) -> str:
    """Return why privacy.unit=client and a method do not go together, or ""."""
    state = method.start()
    (sent,) = method.send(state, [0], train=True).values()
    uploaded = method.expected(state, sent).keys()
    if reports := method.reports():
        return f"which uploads {', '.join(sorted(reports))} besides: no update of what was received"
    if not uploaded:
        return "whose clients upload nothing"
    if copies := uploaded - moved(method):
        return f"whose clients upload {', '.join(sorted(copies))}, which they do not train"
    if method.settings.privacy.where == "server":
        if rule in OF_SINGLE_UPLOADS:
            return f"where the server knows a mean alone and server.rule={rule!r} wants each upload"
        if not needs_only_mean(method):
            return "whose server makes more of uploads than their mean; use privacy.where='client'"
    return ""


def noised_upload(method: Method[Any, Any], work: Work[Any], tensors: Tensors) -> dict[str, Tensor]:
    """Return what goes up of a client's tensors: its update clipped and, where=client, noised.

    Raises UsageError for a tensor that did not come down.
    """
    settings = method.settings
    privacy, base = settings.privacy, {n: t.cpu() for n, t in work.received.items()}
    if other := tensors.keys() - base.keys():
        raise UsageError(f"{', '.join(sorted(other))}: no update of what was received goes up")
    update = clipped_update(privacy.clip_norm, _differences(tensors, base))
    if privacy.where == "client":
        source = _source(privacy, settings.seed, work.client_id, work.round)
        std = privacy.noise * privacy.clip_norm
        update = {name: t + gaussian(t, std, source) for name, t in update.items()}
    return {name: (base[name].double() + t).to(base[name].dtype) for name, t in update.items()}


def in_place_of_each(
    settings: Settings, sent: Mapping[int, Tensors], uploads: Mapping[int, Upload], round: int
) -> dict[int, Upload]:
    """Return the private mean in the place of each upload, so that no merge can see another.

    mean = what was sent + (SUM_i clipped update_i + N(0, (z C)^2)) / n over all n who were asked.
    One who failed counts as an update of 0: whether a client fails may depend on its data.
    """
    privacy = settings.privacy
    base = next(iter(sent.values()))
    names = next(iter(uploads.values())).tensors.keys()
    total = {name: torch.zeros(base[name].shape, dtype=torch.float64) for name in names}
    for client_id in sorted(uploads):
        update = _differences(uploads[client_id].tensors, base)
        # Clipped again: whoever sent it may not have done so
        for name, part in clipped_update(privacy.clip_norm, update).items():
            total[name] += part
    source = _source(privacy, settings.seed, "server", round)
    std = privacy.noise * privacy.clip_norm
    mean = {
        name: (base[name].double() + (t + gaussian(t, std, source)) / len(sent)).to(base[name])
        for name, t in total.items()
    }
    return {i: Upload(dict(mean), upload.num_examples) for i, upload in uploads.items()}


def sums_of_a_round(method: Method[Any, Any]) -> int:
    """Return how many noised sums a client, or an image of it, is part of in a round."""
    if method.settings.privacy.unit != "example":
        return 1
    phases = method.schedule(method.build(), method.settings.local_epochs)
    # An image is in one step of an epoch
    return sum(epochs for epochs, _ in phases)


def effective_noise(privacy: PrivacySettings) -> float:
    """Return the noise in units of the distance between the two sums that epsilon compares."""
    # Other data in the place of some take an update away and add one: 2 C
    return privacy.noise / (2 if privacy.neighbours == "replaced" else 1)


class Ledger:
    """What each client has spent, in the server's state: a resumed run goes on from there."""

    def __init__(self, method: Method[Any, Any], state: ServerState, clients: int) -> None:
        self.privacy = method.settings.privacy
        self.state = state
        self.a_round = sums_of_a_round(method)
        if SUMS not in state.extra:
            state.extra[SUMS] = torch.zeros(clients, dtype=torch.int64)
        self.noise = effective_noise(self.privacy)
        budget = self.privacy.budget or math.inf
        self.most = sums_within(budget, self.noise, self.privacy.delta)

    def ask(self, clients: Sequence[int]) -> list[int]:
        """Return those who have budget left, and count a round for them, answered or not.

        A round that was tried again may leave somebody with less than was planned.
        """
        sums = self.state.extra[SUMS].clone()
        asked = [i for i in clients if int(sums[i]) + self.a_round <= self.most]
        for client_id in clients:
            if client_id not in asked:
                logger.warning("client %d has spent privacy.budget and is not asked", client_id)
        sums[asked] += self.a_round
        self.state.extra[SUMS] = sums
        return asked

    def epsilon(self) -> float | None:
        """Return what the client that was asked most often has spent; None: not bounded."""
        epsilon = self.epsilon_of(int(self.state.extra[SUMS].max()))
        return epsilon if math.isfinite(epsilon) else None

    def epsilon_of(self, sums: int) -> float:
        """Return the epsilon of so many noised sums."""
        return epsilon_after(sums, self.noise, self.privacy.delta)

    def check(self, last: int, participants: Callable[[int], list[int]]) -> None:
        """Raise UsageError where the rounds up to `last` would spend more than the budget."""
        sums = self.state.extra[SUMS].clone()
        for number in range(self.state.round + 1, last + 1):
            for client_id in participants(number):
                sums[client_id] += self.a_round
            if int(sums.max()) > self.most:
                raise UsageError(
                    f"setting privacy.budget={self.privacy.budget:g}: round {number} of {last} "
                    f"would spend epsilon {self.epsilon_of(int(sums.max())):.4g}; {number - 1} "
                    "rounds fit: lower num-server-rounds, or raise privacy.noise"
                )


def _differences(tensors: Tensors, base: Tensors) -> dict[str, Tensor]:
    return {name: tensor.double() - base[name].double() for name, tensor in tensors.items()}


def _source(privacy: PrivacySettings, seed: int, *of: int | str) -> torch.Generator | None:
    """Return where noise is drawn from; None: the operating system."""
    return None if privacy.secret_noise else torch_generator(seed, "privacy", *of)
