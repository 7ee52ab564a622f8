"""What can be set: typed sections, read from Flower's flat, kebab-case run configuration.

A section is a frozen pydantic model whose fields are made by `setting`, or are sections themselves.
A flat configuration names a field of an inner section with a dot: data.num-clients. This module
knows how to check a section; `config` says which ones a run has.
"""

import contextlib
import difflib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo

from pfedmoap_flwr.errors import UsageError

Value = bool | int | float | str


@dataclass(frozen=True)
class Span:
    """Numbers of a setting from low to high, both included; log: as many in each power of ten."""

    low: float
    high: float
    log: bool
    whole: bool


S = TypeVar("S", bound="Section")

FilePath = Annotated[str, AfterValidator(os.path.expanduser), "path"]
"""The type of a setting that names a file or folder; ~ is the home folder of who reads it."""

LARGEST_WHOLE = 2**63 - 1  # what Flower's messages carry
LARGEST_NUMBER = 1e30  # in float32 even its products with weights and counts are finite
SHOWN = 100  # characters of a wrong value in a message

# What a value of a type is called in an error
NOUNS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
}


def key_of(field_name: str) -> str:
    """Return Flower's spelling of a field: local_epochs -> local-epochs, lambda_ -> lambda."""
    return field_name.rstrip("_").replace("_", "-")


class Section(BaseModel):
    """Settings that belong together. This class itself is the section without any.

    Values are checked on construction and not converted, except that a whole number is taken where
    a number is expected.
    """

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        alias_generator=key_of,
        validate_by_name=True,
        validate_by_alias=True,
    )

    @field_validator("*")
    @classmethod
    def _one_of_the_choices(cls, value: Any, info: ValidationInfo) -> Any:
        allowed = choices(cls.model_fields[str(info.field_name)])
        if allowed and value not in allowed:
            raise ValueError(no_choice(value, allowed))
        return value

    @field_validator("*")
    @classmethod
    def _can_travel_and_be_computed_with(cls, value: Any) -> Any:
        if isinstance(value, int) and abs(value) > LARGEST_WHOLE:
            raise ValueError(f"must be a whole number up to {LARGEST_WHOLE}")
        if isinstance(value, float) and abs(value) > LARGEST_NUMBER:
            raise ValueError(f"must be a number up to {LARGEST_NUMBER:g}")
        # Neither messages nor files take them; a surrogate is a byte that is not UTF-8
        if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
            raise ValueError("must be text in UTF-8, without NUL")
        return value

    def flat(self) -> dict[str, Value]:
        """Return {key: value} of all settings."""
        return flatten(self.model_dump(by_alias=True))


def setting(
    default: Value,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """Declare a field: default, one line of help, bounds low <= value <= high and value > above.

    `choices` are the allowed texts where the program collects them, as names of partitions; fixed
    ones are a Literal type.
    """
    return Field(
        default,
        description=help,
        ge=low,
        le=high,
        gt=above,
        json_schema_extra={"enum": list(choices)} if choices else None,
    )


def fields(section: type[Section], prefix: str = "") -> dict[str, FieldInfo]:
    """Return {prefix + key: field}, those of inner sections last.

    A field has the `default`, the `annotation` (its type) and the `description` (its help).
    """
    own: dict[str, FieldInfo] = {}
    inner: dict[str, FieldInfo] = {}
    for name, field in section.model_fields.items():
        key, kind = prefix + key_of(name), field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            inner |= fields(kind, f"{key}.")
        elif not field.exclude:
            own[key] = field
    return own | inner


def choices(field: FieldInfo) -> tuple[str, ...]:
    """Return the texts that a field can be; empty where any value within its bounds is right."""
    if get_origin(field.annotation) is Literal:
        return get_args(field.annotation)
    extra = field.json_schema_extra
    found = extra.get("enum") if isinstance(extra, dict) else None
    return tuple(map(str, found)) if isinstance(found, list) else ()


def limits(field: FieldInfo) -> list[str]:
    """Return the bounds of a number, as ">= 1"; none where any will do."""
    signs = {"ge": ">=", "gt": ">", "le": "<="}
    return [
        f"{sign} {getattr(rule, name):g}"
        for name, sign in signs.items()
        for rule in field.metadata
        if hasattr(rule, name)
    ]


def help_line(field: FieldInfo) -> str:
    """Return a field's help, choices included."""
    text, allowed = field.description or "", choices(field)
    return f"{text}: {' | '.join(allowed)}" if allowed else text


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a table of tables as one, {"data": {"alpha": 1}} as {"data.alpha": 1}, tables last."""
    flat = {prefix + key: value for key, value in table.items() if not isinstance(value, Mapping)}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
    return flat


def build(section: type[S], flat: Mapping[str, Any], prefix: str = "") -> S:
    """Make a section from its keys, which start with `prefix`; others are ignored.

    Raises UsageError for a wrong type, an unknown choice or a value out of bounds.
    """
    known = fields(section, prefix)
    values = _nest({key.removeprefix(prefix): flat[key] for key in known if key in flat})
    try:
        return section.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = prefix + ".".join(map(str, first["loc"]))
        reason = _reason(known[key], first["type"], first["input"], first.get("ctx", {}))
        raise UsageError(f"setting {key}={shown(first['input'])}: {reason}") from None


def reject_unknown(flat: Iterable[str], known: Iterable[str]) -> None:
    """Raise UsageError naming the first unknown key and the nearest known one."""
    known = list(known)
    for key in flat:
        if key not in known:
            near = _nearest(key[:SHOWN], known)
            raise UsageError(f"unknown setting {shown(key)}; did you mean '{near}'?")


def no_choice(value: Any, allowed: Iterable[str]) -> str:
    """Return the reason why a value is wrong that is none of those allowed."""
    allowed = list(allowed)
    near = _nearest(str(value)[:SHOWN], allowed)
    return f"must be one of {', '.join(allowed)}; did you mean '{near}'?"


def is_path(field: FieldInfo) -> bool:
    """Tell whether a setting names a file or folder."""
    return "path" in field.metadata


def path_of(key: str, text: str) -> Path:
    """Return the absolute path that a setting names; there may be nothing yet.

    Raises UsageError where no file can be called so, or nobody may look.
    """
    try:
        path = Path(text).expanduser().resolve()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.stat()  # only the system knows which names are too long
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise UsageError(f"setting {key}={shown(text)}: cannot be a path ({reason})") from None
    return path


def shown(value: Any) -> str:
    """Return a value for a message, its middle left out where it is long."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} ... {text[-SHOWN // 4 :]}"


def _reason(field: FieldInfo, error: str, value: Any, context: Mapping[str, Any]) -> str:
    """Put pydantic's kind of error into this program's words."""
    if error == "value_error":  # from a validator of ours
        return str(context["error"])
    if allowed := choices(field):
        return no_choice(value, allowed)
    if error.endswith("_type"):
        return f"must be {NOUNS[field.annotation]}"
    return f"must be {' and '.join(limits(field)) or 'finite'}"


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `flatten`."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        table = nested
        for section in sections:
            table = table.setdefault(section, {})
        table[name] = value
    return nested


def _nearest(word: str, words: list[str]) -> str:
    return difflib.get_close_matches(word, words, n=1, cutoff=0.0)[0]
