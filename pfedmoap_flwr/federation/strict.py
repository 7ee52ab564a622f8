"""What came over the wire is read here alone: the answer is a value of the right kind, or Refused.

Sizes and types are compared before anything is decoded, so that a message of a few bytes cannot ask
for memory; and no text of the other side gets into a log as it is.
"""

import io
import math
import re
from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

LARGEST = 1e12
"""Prompts, gates and sums over images stay far below; squares of it still fit float32."""
MOST_CLIENTS = 10**9
SHOWN = 1000
HEADER_BYTES = 1024
DTYPES = frozenset({"float32", "float64", "float16", "int64", "int32", "bool"})
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,99}")

R = TypeVar("R", ArrayRecord, ConfigRecord, MetricRecord)


class Refused(ValueError):
    """A message that is not what it should be; says what is wrong, in one line."""


def shown(text: object, limit: int = SHOWN) -> str:
    """Return text of the other side for a log: one line, no control characters, of limited size.

    Otherwise it could forge lines, clear a terminal or fill a disk.
    """
    lines = [line for line in str(text)[-100 * limit :].splitlines() if line.strip()]
    line = "".join(c if c.isprintable() else "?" for c in (lines or [""])[-1].strip())
    return line if len(line) <= limit else f"{line[:limit]} ..."


def record(content: RecordDict, name: str, kind: type[R]) -> R:
    """Return a record of a message."""
    found = content.get(name)
    if not isinstance(found, kind):
        raise Refused(f"there is no {kind.__name__} {name!r}")
    return found


def whole(said: Mapping[str, object], name: str, low: int, high: int) -> int:
    """Return a whole number from `low` to `high`."""
    value = said.get(name)
    if type(value) is not int or not low <= value <= high:
        raise Refused(f"{name} is {_kind(value)}, not a whole number from {low} to {high}")
    return value


def number(said: Mapping[str, object], name: str, low: float, high: float) -> float:
    """Return a finite number from `low` to `high`."""
    value = said.get(name)
    if type(value) not in (int, float) or not low <= value <= high:  # type: ignore[operator]
        raise Refused(f"{name} is {_kind(value)}, not a number from {low:g} to {high:g}")
    return float(value)  # type: ignore[arg-type]


def wholes(said: Mapping[str, object], name: str, count: int, total: int) -> list[int]:
    """Return exactly `count` whole numbers from 0 whose sum is `total`."""
    values = said.get(name)
    if not isinstance(values, list) or len(values) != count:
        raise Refused(f"{name} is no list of {count} whole numbers")
    found = [whole({name: value}, name, 0, total) for value in values]
    if sum(found) != total:
        raise Refused(f"{name} counts {sum(found)} images, not {total}")
    return found


def text(said: Mapping[str, object], name: str, limit: int) -> str:
    """Return a text of at most `limit` characters, none of them a control character."""
    value = said.get(name)
    if not isinstance(value, str) or len(value) > limit or not value.isprintable():
        raise Refused(f"{name} is no printable text of at most {limit} characters")
    return value


def texts(said: Mapping[str, object], name: str, count: int, limit: int) -> tuple[str, ...]:
    """Return at most `count` texts of at most `limit` characters each."""
    values = said.get(name)
    if not isinstance(values, list) or len(values) > count:
        raise Refused(f"{name} is no list of at most {count} texts")
    return tuple(text({name: value}, name, limit) for value in values)


def tensors(content: RecordDict, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of record "arrays"; `expected` has an example of each one.

    Names, shapes and dtypes are those, and all numbers are finite and no larger than LARGEST.
    """
    arrays = record(content, "arrays", ArrayRecord)
    if arrays.keys() != expected.keys():
        came = ", ".join(shown(name, 60) for name in sorted(arrays)[:20])
        raise Refused(f"came with tensors {came or 'none'}, not {', '.join(sorted(expected))}")
    return {name: tensor(name, arrays[name], like) for name, like in expected.items()}


def tensor(name: str, array: Array, like: Tensor) -> Tensor:
    """Return one array as a tensor of the shape and dtype of `like`."""
    return _decode(name, array, tuple(like.shape), str(like.numpy(force=True).dtype))


def tensor_of(name: str, array: Array, limit: int) -> Tensor:
    """Return one array as a tensor of any shape of at most `limit` bytes and a usual dtype."""
    if str(array.dtype) not in DTYPES:
        raise Refused(f"{name} has dtype {shown(array.dtype, 60)}")
    size = math.prod(array.shape) if len(array.shape) <= 8 else limit
    if not 0 <= size <= limit or len(array.data) > limit:
        raise Refused(f"{name} has more than {limit} bytes")
    return _decode(name, array, tuple(array.shape), str(array.dtype))


def _decode(name: str, array: Array, shape: tuple[int, ...], dtype: str) -> Tensor:
    if tuple(array.shape) != shape:
        raise Refused(f"{name} has shape {shown(tuple(array.shape), 60)}, not {shape}")
    if str(array.dtype) != dtype:
        raise Refused(f"{name} has dtype {shown(array.dtype, 60)}, not {dtype}")
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if array.stype != "numpy.ndarray" or len(array.data) > size + HEADER_BYTES:
        raise Refused(f"{name} is no NumPy array of {size} bytes")
    values = torch.from_numpy(_numbers(name, array.data, shape, np.dtype(dtype)))
    if not torch.isfinite(values).all():
        raise Refused(f"{name} is not finite; lower the learning rate")
    if values.is_floating_point() and values.numel() and float(values.abs().max()) > LARGEST:
        raise Refused(f"{name} has numbers above {LARGEST:g}; lower the learning rate")
    return values


def _numbers(name: str, data: bytes, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return what the bytes of a .npy file hold if its header says the same as the message."""
    stream = io.BytesIO(data)
    try:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError
        header = np.lib.format.read_array_header_1_0(stream, max_header_size=HEADER_BYTES)
    except Exception as error:  # it is the other side's text: whatever it raises
        raise Refused(f"{name} has no header of a NumPy array") from error
    body = data[stream.tell() :]
    if header != (shape, False, dtype) or len(body) != math.prod(shape) * dtype.itemsize:
        raise Refused(f"{name} is another array than the message says")
    return np.frombuffer(body, dtype).reshape(shape).copy()


def _kind(value: object) -> str:
    """Return how a wrong number is named: by itself where it is short, else by its type."""
    known = isinstance(value, int | float) and len(repr(value)) <= 40
    return repr(value) if known else ("missing" if value is None else type(value).__name__)
