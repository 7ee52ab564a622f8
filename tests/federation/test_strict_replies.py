"""Whatever a client answers, it is read as what was asked for or refused, in one line."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from pfedmoap_flwr.federation.messages import ACCURACIES, to_arrays
from pfedmoap_flwr.federation.replies import Trained, check_evaluation, check_upload, too_far
from pfedmoap_flwr.federation.strict import Refused, shown
from pfedmoap_flwr.methods.base import Upload

CTX = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
EXPECTED = {"ctx": torch.zeros(4, 32)}
MOST = 24
Change = Callable[[RecordDict], Any]


def trained() -> RecordDict:
    """What an honest client 2 answers after training."""
    said = {"client": 2, "num-examples": 24, "loss": 1.5, "memory": 10**9, "method.norm": 0.25}
    return RecordDict({"arrays": to_arrays({"ctx": CTX}), "metrics": MetricRecord(said)})


def measured() -> RecordDict:
    """What an honest client 2 answers when it is measured."""
    numbers = {"client": 2, "personal-accuracy": 0.5, "global-accuracy": 1.0}
    return RecordDict({"metrics": MetricRecord(numbers)})


def test_an_honest_answer_is_what_was_sent() -> None:
    answer = check_upload(trained(), 2, EXPECTED, MOST)
    assert torch.equal(answer.upload.tensors["ctx"], CTX)
    assert answer.upload.num_examples == 24
    assert (answer.loss, answer.memory, answer.metrics) == (1.5, 10**9, {"norm": 0.25})
    assert check_evaluation(measured(), 2, ACCURACIES) == {
        "personal-accuracy": 0.5,
        "global-accuracy": 1.0,
    }


def put(name: str, record: Any) -> Change:
    def change(content: RecordDict) -> None:
        content[name] = record

    return change


def drop(name: str) -> Change:
    return lambda content: content.pop(name)


def said(**numbers: Any) -> Change:
    def change(content: RecordDict) -> None:
        metrics: Any = content["metrics"]
        for name, value in numbers.items():
            name = name.replace("_", "-")
            if value is None:
                del metrics[name]
            else:
                metrics[name] = value

    return change


def arrays(**given: Any) -> Change:
    """Other arrays: NumPy's, or Flower's with a header of their own."""
    made = {n: a if isinstance(a, Array) else Array(np.asarray(a)) for n, a in given.items()}
    return put("arrays", ArrayRecord(made))


def npy(header: bytes, body: bytes = b"") -> bytes:
    """The bytes of a .npy file with this header."""
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + body


def wire(data: bytes, shape: tuple[int, ...] = (4, 32), **changes: Any) -> Array:
    """An array that says it is a (4, 32) prompt, whatever its bytes are."""
    given = {"dtype": "float32", "stype": "numpy.ndarray", **changes}
    return Array(shape=shape, data=data, **given)


def saved(array: np.ndarray, **options: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def numbers(dtype: str = "float32", **places: float) -> np.ndarray:
    found = CTX.numpy().astype(dtype)
    for value in places.values():
        found[0, 0] = value
    return found


HUGE = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }\n"
OTHER = b"{'descr': '<f4', 'fortran_order': False, 'shape': (8, 16), }\n"
HOSTILE: dict[str, Change] = {
    "no metrics": drop("metrics"),
    "no arrays": drop("arrays"),
    "empty": RecordDict.clear,
    "metrics are arrays": put("metrics", ArrayRecord()),
    "metrics are texts": put("metrics", ConfigRecord({"client": "2", "num-examples": "24"})),
    "arrays are metrics": put("arrays", MetricRecord({"ctx": 1.0})),
    "arrays are a config": put("arrays", ConfigRecord({"ctx": "1"})),
    "no client": said(client=None),
    "another client": said(client=1),
    "client is a fraction": said(client=2.9),
    "client is a list": said(client=[2]),
    "no examples": said(num_examples=None),
    "0 examples": said(num_examples=0),
    "-1 examples": said(num_examples=-1),
    "more examples than it has": said(num_examples=25),
    "1e9 examples": said(num_examples=10**9),
    "2^63 - 1 examples": said(num_examples=2**63 - 1),
    "7.9 examples": said(num_examples=7.9),
    "Inf examples": said(num_examples=float("inf")),
    "a list of examples": said(num_examples=[24]),
    "loss NaN": said(loss=float("nan")),
    "loss Inf": said(loss=float("inf")),
    "loss -1e30": said(loss=-1e30),
    "loss is a list": said(loss=[1.0, 2.0]),
    "memory below 0": said(memory=-1),
    "2^63 - 1 bytes of memory": said(memory=2**63 - 1),
    "memory NaN": said(memory=float("nan")),
    "a list of memory": said(memory=[1]),
    "a metric NaN": said(**{"method.norm": float("nan")}),
    "a metric's name forges a line": said(**{"method.\n[INFO] run completed": 1.0}),
    "a metric's name of 1 MB": said(**{"method." + "x" * 10**6: 1.0}),
    "1,000 metrics": said(**{f"method.m{i}": 1.0 for i in range(1000)}),
    "no tensors": arrays(),
    "another name": arrays(prompt=numbers()),
    "a gate besides": arrays(ctx=numbers(), gate=numbers()),
    "NaN": arrays(ctx=numbers(a=np.nan)),
    "Inf": arrays(ctx=numbers(a=np.inf)),
    "1e20": arrays(ctx=numbers(a=1e20)),
    "3e38": arrays(ctx=numbers(a=-3e38)),
    "another shape": arrays(ctx=numbers()[:2]),
    "one number": arrays(ctx=np.float32(1)),
    **{
        f"dtype {dtype}": arrays(ctx=numbers(dtype))
        for dtype in ("float64", "float16", "int8", "int64", "bool", "complex64", "longdouble")
    },
    "dtype S4": arrays(ctx=CTX.numpy().astype("S4")),
    "dtype datetime64": arrays(ctx=np.zeros((4, 32), "datetime64[s]")),
    "structured": arrays(ctx=np.zeros((4, 32), [("a", "f4")])),
    "200 MB": arrays(ctx=np.zeros((50, 1000, 1000), np.float32)),
    "200 MB that say 512 bytes": arrays(ctx=wire(bytes(2 * 10**8))),
    "0 bytes": arrays(ctx=wire(b"")),
    "noise": arrays(ctx=wire(b"\x00\xff" * 300)),
    "an npz": arrays(ctx=wire(b"PK\x03\x04" + bytes(600))),
    "a header of 4 TB": arrays(ctx=wire(npy(HUGE))),
    "a header of parentheses": arrays(ctx=wire(npy(b"(" * 900))),
    "a header of another shape": arrays(ctx=wire(npy(OTHER, CTX.numpy().tobytes()))),
    "another dtype in the header": arrays(ctx=wire(saved(np.zeros((4, 32), np.int32)))),
    "Fortran's order": arrays(ctx=wire(saved(np.asfortranarray(CTX.numpy())))),
    "a torch file": arrays(ctx=wire(saved(CTX.numpy()), stype="torch")),
    "half of its bytes": arrays(ctx=wire(saved(CTX.numpy())[:-256])),
    "objects": arrays(ctx=wire(saved(np.array([{}]), allow_pickle=True))),
    "a shape below 0": arrays(ctx=wire(saved(CTX.numpy()), shape=(-4, -32))),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_train_reply_that_is_not_what_was_asked_for_is_refused(change: Change) -> None:
    content = trained()
    change(content)
    with pytest.raises(Refused) as refused:
        check_upload(content, 2, EXPECTED, MOST)
    line = str(refused.value)
    assert line.isprintable()
    assert len(line) < 400


MEASURED: dict[str, Change] = {
    "no metrics": drop("metrics"),
    "texts": put("metrics", ConfigRecord({"client": 2, "personal-accuracy": "1"})),
    "another client": said(client=0),
    "7.5": said(personal_accuracy=7.5),
    "-3": said(global_accuracy=-3.0),
    "NaN": said(personal_accuracy=float("nan")),
    "Inf": said(personal_accuracy=float("inf")),
    "a list": said(personal_accuracy=[0.5]),
    "a made-up name": said(**{"../../x-accuracy": 0.5}),
    "markup": said(**{"[bold red]\n<script>-accuracy": 0.5}),
    "1 MB of name": said(**{"x" * 10**6: 0.5}),
}


@pytest.mark.parametrize("change", MEASURED.values(), ids=MEASURED)
def test_a_measurement_that_is_none_is_refused(change: Change) -> None:
    content = measured()
    change(content)
    with pytest.raises(Refused) as refused:
        check_evaluation(content, 2, ACCURACIES)
    assert str(refused.value).isprintable()


# Steps that are far too long


def steps(*lengths: float) -> tuple[dict[int, Trained], dict[int, dict[str, torch.Tensor]]]:
    """Uploads that moved so far from what was sent, by client."""
    unit = torch.zeros(4, 32)
    unit[0, 0] = 1
    answers = {
        i: Trained(Upload({"ctx": CTX + length * unit}, 1), None, None, {})
        for i, length in enumerate(lengths)
    }
    return answers, {i: {"ctx": CTX} for i in answers}


def test_an_upload_that_moved_far_more_than_the_others_is_named() -> None:
    reasons = too_far(*steps(1.0, 2.0, 250.0, 1.5), 100.0)
    assert list(reasons) == [2]
    assert reasons[2] == "ctx moved 250, more than 100 times the median 1.75 (server.max-step)"
    assert not too_far(*steps(1.0, 2.0, 150.0, 1.5), 100.0)


def test_who_alone_learns_a_layer_is_not_too_far() -> None:
    # FedDDA's adapter ends in a ReLU that is dead at most clients: a few train it, by 170 times
    # the median, which is 1 % of the layer's own length
    few = steps(1e-4, 2e-4, 0.03, 1.5e-4)
    assert CTX.norm() > 1
    assert not too_far(*few, 100.0)
    assert list(too_far(*steps(1e-4, 2e-4, 1.1 * float(CTX.norm()), 1.5e-4), 100.0)) == [2]


def test_with_two_clients_or_without_a_limit_nobody_is_too_far() -> None:
    assert not too_far(*steps(1.0, 1e6), 100.0)
    assert not too_far(*steps(1.0, 1.0, 1e6), 0.0)


def test_what_is_shown_of_a_text_is_one_short_line() -> None:
    assert shown("a\n\x1b[2Jround 2/2 loss 0.001\n \n") == "?[2Jround 2/2 loss 0.001"
    assert shown(" \n ") == ""
    assert len(shown("x" * 10**7)) < 1100
