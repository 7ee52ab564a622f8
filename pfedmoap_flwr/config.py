"""All settings of a run: the general ones, one table per part, one table per method.

`python -m pfedmoap_flwr.config` writes the table in pyproject.toml, from which Flower takes the
defaults (a key that is absent there cannot be overridden).
"""

import dataclasses
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pfedmoap_flwr import methods, settings
from pfedmoap_flwr.clip.load import ClipSettings
from pfedmoap_flwr.data.partition import DataSettings
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.base import PromptSettings
from pfedmoap_flwr.settings import Value, setting


@dataclass(frozen=True)
class General:
    """Settings that every run has."""

    method: str = setting("pfedmoap", "what is learned, a module of pfedmoap_flwr/methods")
    seed: int = setting(0, "everything random follows from it", low=0)
    compat: Literal["paper", "released"] = setting(
        "paper", "where the released code contradicts its paper, follow"
    )
    num_server_rounds: int = setting(10, "rounds T", low=1)
    local_epochs: int = setting(5, "epochs E of a client in a round", low=1)
    fraction_train: float = setting(1.0, "fraction r of the clients that train", above=0, high=1)
    batch_size: int = setting(32, "images in a training step", low=1)
    lr: float = setting(0.002, "learning rate of the prompt (SGD)", above=0)
    eval_every: int = setting(1, "evaluate all clients after every n-th round", low=1)
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where clients compute")
    clients_at_once: int = setting(
        0, "clients that an in-process run trains at once; 0: what memory and cores allow", low=0
    )
    min_nodes: int = setting(2, "start when so many SuperNodes are connected", low=1)
    node_timeout: float = setting(600.0, "seconds to wait for SuperNodes and for replies", above=0)
    state_dir: str = setting("", "where clients keep their state; empty: ~/.pfedmoap/clients")
    run_dir: str = setting("", "results folder; empty: runs/<time>-<method>-<dataset>-s<seed>")
    resume: str = setting("", "results folder of a run to continue")


FLOWER_TABLE = "tool.flwr.app.config"
PARTS: dict[str, type] = {"prompt": PromptSettings, "clip": ClipSettings, "data": DataSettings}


@dataclass(frozen=True)
class Settings(General):
    """Everything a run was asked to do; `tables` holds the settings objects of the methods."""

    prompt: PromptSettings = dataclasses.field(default_factory=PromptSettings)
    clip: ClipSettings = dataclasses.field(default_factory=ClipSettings)
    data: DataSettings = dataclasses.field(default_factory=DataSettings)
    tables: Mapping[str, Any] = dataclasses.field(default_factory=lambda: _method_tables({}))

    @property
    def own(self) -> Any:
        """The chosen method's own settings, or None."""
        return self.tables.get(self.method)

    def flat(self) -> dict[str, Value]:
        """Return all settings as Flower's flat configuration."""
        general = {field.name: getattr(self, field.name) for field in dataclasses.fields(General)}
        result = settings.flatten(General(**general))
        for name, part in [*((n, getattr(self, n)) for n in PARTS), *self.tables.items()]:
            result |= settings.flatten(part, f"{name}.")
        return result

    def replace(self, flat: Mapping[str, Value]) -> "Settings":
        """Return a copy with some flat keys set."""
        return parse({**self.flat(), **flat})


def parse(flat: Mapping[str, Value]) -> Settings:
    """Make Settings from a flat configuration; keys that are left out keep their defaults.

    Raises UsageError naming the key for an unknown key, a wrong type, an impossible value.
    """
    settings.reject_unknown(flat, known_keys())
    general = settings.build(General, flat)
    if general.method not in methods.names():
        raise UsageError(
            f"setting method={general.method!r}: must be one of {', '.join(methods.names())}"
        )
    parts: dict[str, Any] = {
        name: settings.build(cls, flat, f"{name}.") for name, cls in PARTS.items()
    }
    return Settings(**vars(general), **parts, tables=_method_tables(flat))


def parse_words(words: list[str]) -> dict[str, Value]:
    """Read KEY=VALUE words of a command line as a flat configuration.

    A value is read as its setting's type: `seed=1` a whole number, `lr=1` a number.
    """
    defaults = Settings().flat()
    flat: dict[str, Value] = {}
    for word in words:
        key, separator, text = word.partition("=")
        if not separator:
            raise UsageError(f"'{word}' is not KEY=VALUE, as in local-epochs=1")
        settings.reject_unknown([key], defaults)
        flat[key] = _read(key, text.strip().strip("\"'"), defaults[key])
    return flat


def parse_file(path: Path) -> dict[str, Value]:
    """Read a TOML file of settings, tables and all, as a flat configuration.

    Raises UsageError naming the file, and the key where one is wrong.
    """
    try:
        flat = _flatten(tomllib.loads(path.read_text()))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UsageError(f"{path}: not TOML ({error})") from error
    try:
        parse(flat)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    return flat


def known_keys() -> dict[str, str]:
    """Return {key: help} of every setting there is."""
    lines = settings.helps(General)
    for name, cls in [*PARTS.items(), *_table_classes().items()]:
        lines |= settings.helps(cls, f"{name}.")
    return lines


def _read(key: str, text: str, default: Value) -> Value:
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[text.lower()]
        return type(default)(text)
    except (KeyError, ValueError):
        kind = {bool: "true or false", int: "a whole number", float: "a number"}[type(default)]
        raise UsageError(f"setting {key}={text!r}: must be {kind}") from None


def _flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        inner = isinstance(value, Mapping)
        flat |= _flatten(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return flat


def _table_classes() -> dict[str, type]:
    classes = {name: methods.load(name).table for name in methods.names()}
    return {name: cls for name, cls in classes.items() if cls is not None}


def _method_tables(flat: Mapping[str, Value]) -> dict[str, Any]:
    return {name: settings.build(cls, flat, f"{name}.") for name, cls in _table_classes().items()}


def toml(
    flat: Mapping[str, Value], root: str = "", comments: Mapping[str, str] | None = None
) -> str:
    """Return a flat configuration as TOML tables below `root`, with a comment after each key."""
    groups: dict[str, list[str]] = {}
    for key, value in flat.items():
        table, _, name = key.rpartition(".")
        comment = f"  # {comments[key]}" if comments else ""
        groups.setdefault(table, []).append(f"{name} = {_toml(value)}{comment}")
    blocks = []
    for table, lines in groups.items():
        title = ".".join(part for part in (root, table) if part)
        blocks.append("\n".join([f"[{title}]"] * bool(title) + lines))
    return "\n\n".join(blocks) + "\n"


def pyproject_table() -> str:
    """Return Flower's configuration table with every default and its help."""
    return toml(Settings().flat(), FLOWER_TABLE, known_keys())


def write_pyproject(path: Path) -> None:
    """Replace the settings tables at the end of a pyproject.toml."""
    text = path.read_text()
    head = re.split(rf"^\[{re.escape(FLOWER_TABLE)}", text, maxsplit=1, flags=re.MULTILINE)[0]
    path.write_text(head.rstrip("\n") + "\n\n" + pyproject_table())


def _toml(value: Value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


if __name__ == "__main__":
    write_pyproject(Path(__file__).parent.parent / "pyproject.toml")
