"""What the server sends is checked before a head takes it: it would be trained on and kept."""

import functools
from typing import Any

from flwr.app import ArrayRecord, RecordDict
from torch import Tensor

from pfedmoap_flwr.federation import strict
from pfedmoap_flwr.federation.strict import Refused
from pfedmoap_flwr.methods.base import Method

MOST_TENSORS = 200
MOST_BYTES = 2**29
EXAMPLE_CLIENTS = (0, 1)


def read_delivery(
    method: Method[Any, Any], content: RecordDict, *, train: bool
) -> dict[str, Tensor]:
    """Return the tensors of a message for a client, each finite and no larger than strict.LARGEST.

    A shared parameter has the shape and dtype of the head's, and a prompt that every client is sent
    at the start is never missing. No name is that of a personal parameter, which the server must
    not overwrite.

    Raises Refused for anything else.
    """
    arrays = strict.record(content, "arrays", ArrayRecord)
    if len(arrays) > MOST_TENSORS or sum(len(a.data) for a in arrays.values()) > MOST_BYTES:
        raise Refused(f"came with more than {MOST_TENSORS} tensors or {MOST_BYTES} bytes")
    for name in arrays:
        if not strict.NAME.fullmatch(name) or method.is_personal(name):
            raise Refused(f"{strict.shown(name, 60)} is nothing that a server may send")
    shared, sent = _usual(method, train)
    if "ctx" in sent - arrays.keys():
        raise Refused("came without ctx")
    return {
        name: strict.tensor(name, array, shared[name])
        if name in shared
        else strict.tensor_of(name, array, MOST_BYTES)
        for name, array in arrays.items()
    }


@functools.lru_cache(maxsize=8)
def _usual(method: Method[Any, Any], train: bool) -> tuple[dict[str, Tensor], frozenset[str]]:
    """Return the shared parameters of a fresh head, and the names that every client is sent."""
    sent = method.send(method.start(), EXAMPLE_CLIENTS, train=train)
    return method.shared(method.build()), frozenset.intersection(*map(frozenset, sent.values()))
