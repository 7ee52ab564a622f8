"""Whatever a server sends, a client's head takes it as what was meant or not at all."""

from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, RecordDict

from pfedmoap_flwr.federation.deliveries import read_delivery
from pfedmoap_flwr.federation.messages import to_arrays
from pfedmoap_flwr.federation.strict import Refused
from support.federation import make_method

CTX = np.full((4, 32), 0.5, np.float32)
EXPERTS = np.full((2, 4, 32), 0.25, np.float32)


@pytest.fixture(scope="module")
def method() -> Any:
    """pFedMoAP, whose gate is the client's own."""
    return make_method("pfedmoap")


def delivery(**arrays: Any) -> RecordDict:
    return RecordDict({"arrays": ArrayRecord({n: Array(a) for n, a in arrays.items()})})


def test_what_is_meant_is_taken(method: Any) -> None:
    found = read_delivery(method, delivery(ctx=CTX, experts=EXPERTS), train=True)
    assert torch.equal(found["ctx"], torch.from_numpy(CTX))
    assert torch.equal(found["experts"], torch.from_numpy(EXPERTS))


def changed(array: np.ndarray, value: float) -> np.ndarray:
    array = array.copy()
    array.flat[-1] = value
    return array


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"experts": EXPERTS}, "came without ctx"),
        ({"ctx": changed(CTX, np.nan)}, "ctx is not finite"),
        ({"ctx": changed(CTX, 1e30)}, "ctx has numbers above"),
        ({"ctx": CTX, "experts": changed(EXPERTS, np.nan)}, "experts is not finite"),
        ({"ctx": CTX, "experts": changed(EXPERTS, 1e20)}, "experts has numbers above"),
        ({"ctx": CTX[0]}, "ctx has shape"),
        ({"ctx": CTX[:1]}, "ctx has shape"),
        ({"ctx": CTX.astype(np.int64)}, "ctx has dtype int64"),
        ({"ctx": CTX.astype(np.complex64)}, "ctx has dtype complex64"),
        ({"ctx": CTX, "experts": EXPERTS.astype(np.complex64)}, "experts has dtype complex64"),
        ({"ctx": CTX, "gate.query.weight": np.zeros((32, 32), np.float32)}, "gate.query.weight"),
        ({"ctx": CTX, "a\nb": CTX}, "is nothing that a server may send"),
        ({"ctx": CTX, **{f"t{i}": CTX[0] for i in range(1000)}}, "more than 200 tensors"),
        ({"ctx": CTX.astype("S4")}, "ctx has dtype"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_anything_else_is_refused(method: Any, arrays: Any, said: str) -> None:
    with pytest.raises(Refused, match=said):
        read_delivery(method, delivery(**arrays), train=True)


def test_no_arrays_are_refused(method: Any) -> None:
    with pytest.raises(Refused, match="there is no ArrayRecord 'arrays'"):
        read_delivery(method, RecordDict(), train=False)


def test_tensors_come_in_memory_of_their_own(method: Any) -> None:
    content = RecordDict({"arrays": to_arrays({"ctx": torch.from_numpy(CTX)})})
    first = read_delivery(method, content, train=True)["ctx"]
    first.zero_()
    assert torch.equal(read_delivery(method, content, train=True)["ctx"], torch.from_numpy(CTX))
