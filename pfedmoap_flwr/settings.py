"""Typed settings: frozen dataclasses <-> Flower's flat, kebab-case run configuration.

A settings class is a frozen dataclass whose fields are made by `setting`. This module knows how to
check one; `config` says which ones there are.
"""

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from pfedmoap_flwr.errors import UsageError

Value = bool | int | float | str
T = TypeVar("T")


def setting(
    default: Value,
    help: str,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
    choices: tuple[str, ...] = (),
) -> Any:
    """Declare a field: default, one line of help, bounds low <= value <= high and value > above.

    `choices` are for a text whose values are found, not written down; others have a Literal type.
    """
    bounds = {"low": low, "high": high, "above": above, "choices": choices}
    return dataclasses.field(default=default, metadata={"help": help, **bounds})


def key_of(field_name: str) -> str:
    """Return Flower's spelling of a field: local_epochs -> local-epochs, lambda_ -> lambda."""
    return field_name.rstrip("_").replace("_", "-")


def flatten(instance: Any, prefix: str = "") -> dict[str, Value]:
    """Return the fields of one settings object as {prefix + key: value}."""
    return {
        prefix + key_of(field.name): getattr(instance, field.name)
        for field in dataclasses.fields(instance)
    }


def helps(cls: type, prefix: str = "") -> dict[str, str]:
    """Return {prefix + key: help} of a settings class, choices included."""
    hints = get_type_hints(cls)
    lines = {}
    for field in dataclasses.fields(cls):
        choices = _choices(hints[field.name], field.metadata)
        text = field.metadata["help"]
        lines[prefix + key_of(field.name)] = f"{text}: {' | '.join(choices)}" if choices else text
    return lines


def build(cls: type[T], flat: Mapping[str, Value], prefix: str = "") -> T:
    """Make a settings object from the flat keys that start with `prefix`; others are ignored.

    Raises UsageError for a wrong type, an unknown choice or a value out of bounds.
    """
    hints = get_type_hints(cls)
    values = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        key = prefix + key_of(field.name)
        if key in flat:
            values[field.name] = _checked(key, flat[key], hints[field.name], field.metadata)
    return cls(**values)


def reject_unknown(flat: Iterable[str], known: Iterable[str]) -> None:
    """Raise UsageError naming the first unknown key and the nearest known one."""
    known = list(known)
    for key in flat:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise UsageError(f"unknown setting '{key}'; did you mean '{near[0]}'?")


def _choices(hint: Any, bounds: Mapping[str, Any]) -> tuple[str, ...]:
    return get_args(hint) if get_origin(hint) is Literal else bounds["choices"]


def _checked(key: str, value: Value, hint: Any, bounds: Mapping[str, Any]) -> Value:
    if choices := _choices(hint, bounds):
        if value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.0)
            raise UsageError(
                f"setting {key}={value!r}: must be one of {', '.join(choices)}; "
                f"did you mean '{near[0]}'?"
            )
        return value
    if hint is float and type(value) is int:
        value = float(value)
    if type(value) is not hint:
        raise UsageError(f"setting {key}={value!r}: must be {_article(hint)}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        low, high, above = bounds["low"], bounds["high"], bounds["above"]
        if not math.isfinite(value) or not (low <= value <= high and value > above):
            limits = [f">= {low:g}"] if math.isfinite(low) else []
            limits += [f"<= {high:g}"] if math.isfinite(high) else []
            limits += [f"> {above:g}"] if math.isfinite(above) else []
            raise UsageError(f"setting {key}={value!r}: must be {' and '.join(limits) or 'finite'}")
    return value


def _article(hint: type) -> str:
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}[hint]
