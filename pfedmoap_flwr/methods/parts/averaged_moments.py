"""Moments of a local AMSGrad that go down, go up and are averaged like the parameters (FedLALR).

Moments of what is shared lie in the server's `extra`. They are averaged by the method's own mean,
with its weights: m is linear in the gradients, so that the mean of m belongs to the mean of the
parameters. Moments of what is personal stay in the client's head.
"""

import functools
from collections.abc import Mapping, Sequence

from torch import Tensor

from pfedmoap_flwr.methods.base import Deliveries, H, Method, S, ServerState, Tensors, Upload, Work
from pfedmoap_flwr.methods.parts.amsgrad import add_moments, moments, names_of_moments


class AveragedMoments(Method[S, H]):
    """What AMSGrad adds to a method, on the client and on the server; a base class beside it."""

    def build(self) -> H:
        """Return a fresh head with the moments of its parameters, as buffers."""
        head = super().build()
        add_moments(head, self.settings.optimizer.eps)
        return head

    @functools.cached_property
    def first(self) -> dict[str, Tensor]:
        """The moments of all that is shared, before the first step."""
        head = self.build()
        return moments(head, names_of_moments(self.shared(head)))

    def reports(self) -> dict[str, Tensor]:
        """Return an example of what goes up beside the shared parameters, moments too."""
        return super().reports() | self.first

    def upload(self, work: Work[H]) -> dict[str, Tensor]:
        """Return what goes up, and those moments that came."""
        return super().upload(work) | moments(work.head, work.received.keys() & self.first)

    def start(self) -> ServerState:
        """Return the server's state before round 1, with the moments before the first step."""
        state = super().start()
        state.extra |= self.first
        return state

    def send(self, state: ServerState, client_ids: Sequence[int], *, train: bool) -> Deliveries:
        """Return what goes down, and the moments of the parameters in it."""
        deliveries = super().send(state, client_ids, train=train)
        moments = {client_id: names_of_moments(sent) for client_id, sent in deliveries.items()}
        return {
            i: sent | {name: state.extra[name] for name in self.first if name in moments[i]}
            for i, sent in deliveries.items()
        }

    def expected(self, state: ServerState, sent: Tensors) -> dict[str, Tensor]:
        """Return an example of each tensor that a client must upload: of what it got, moments."""
        expected = super().expected(state, sent)
        return {n: t for n, t in expected.items() if n not in self.first or n in sent}

    def merge(self, state: ServerState, uploads: Mapping[int, Upload]) -> None:
        """Merge as the method does, and average the moments; server.rule has no say in them."""
        super().merge(state, uploads)
        old = ServerState({name: state.extra[name] for name in self.first})
        state.extra |= type(self).combine(self, old, uploads)
