"""Where the values of a run's settings come from, and how they are written down.

The settings of a run are the general ones, a section for each part and one for each method that has
any. A method is imported (and PyTorch with it) when it is chosen or one of its keys is named, so
that a wrong setting is refused at once.

`python -m pfedmoap_flwr.config` writes the table in pyproject.toml, from which Flower takes the
defaults (a key that is absent there cannot be overridden).
"""

import difflib
import functools
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, field_validator
from pydantic.fields import FieldInfo

from pfedmoap_flwr import methods
from pfedmoap_flwr.clip.settings import ClipSettings
from pfedmoap_flwr.data.settings import DataSettings
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.settings import LearningSettings
from pfedmoap_flwr.settings import (
    NOUNS,
    FilePath,
    Section,
    Value,
    build,
    fields,
    flatten,
    help_line,
    is_path,
    no_choice,
    path_of,
    reject_unknown,
    setting,
    shown,
)

METRICS = ("accuracy", "auroc", "f1", "sensitivity", "ece")
FLOWER_TABLE = "tool.flwr.app.config"
# These keys come first wherever settings are listed; the others follow as they are declared
FIRST = ("method", "seed", "compat", "num-server-rounds", "local-epochs", "fraction-train")
# Of the other settings that name a file, some texts mean something else
ALWAYS_PATHS = ("run-dir", "resume", "state-dir", "data.path")
NO_FILE = "a setting names no file; a command does, whenever it runs: --method FILE.py"
T = TypeVar("T")


class ServerSettings(Section):
    """How the server combines what clients upload, for methods that take its mean."""

    rule: Literal[
        "average",
        "fedavgm",
        "fedadagrad",
        "fedadam",
        "fedyogi",
        "fedmedian",
        "fedtrimmedavg",
        "krum",
        "multikrum",
        "bulyan",
    ] = setting("average", "of the shared tensors; all but average are Flower's own")
    lr: float = setting(0.0, "learning rate of fedavgm to fedyogi; 0: Flower's own", low=0)
    momentum: float = setting(0.9, "fedavgm's", low=0, high=1)
    trim: float = setting(0.2, "share cut off at each end by fedtrimmedavg", low=0, high=0.5)
    malicious: int = setting(0, "clients that krum, multikrum and bulyan reckon with", low=0)
    selected: int = setting(1, "clients that multikrum averages", low=1)
    min_replies: int = setting(1, "fewest good uploads that a round is merged from", low=1)
    attempts: int = setting(3, "how often a round is tried whose good uploads are too few", low=1)
    max_step: float = setting(
        100.0, "so many times the median step, beyond what was sent, is refused; 0: never", low=0
    )
    max_refusals: int = setting(
        3, "refused answers in a row after which a client is not asked again", low=1
    )
    metrics_port: int = setting(
        0, "port of 127.0.0.1 where Prometheus reads the run's numbers; 0: none", low=0, high=65535
    )


class EvalSettings(Section):
    """What models are measured on, and what is measured beside accuracy after the last round."""

    split: Literal["test", "validation"] = setting(
        "test", "images that are measured; validation: no test image is read"
    )
    on: str = setting(
        "", "other data sets the common model is measured on at the end: NAME or NAME:PATH, ..."
    )
    below_chance: Literal["stop", "go-on"] = setting(
        "stop", "what a run does where CLIP before any training is no better than guessing"
    )
    metrics: str = setting("", "between commas: accuracy, auroc, f1, sensitivity, ece; empty: none")
    bootstrap: int = setting(200, "resamplings behind a 95 % interval; 0: no intervals", low=0)
    min_count: int = setting(
        5, "metrics that tell of fewer images of a class do not leave a node", low=0
    )
    keep_best: bool = setting(False, "keep the state and the heads of the best validated round")

    @field_validator("on")
    @classmethod
    def _each_once(cls, text: str) -> str:
        names = [part.partition(":")[0] for part in text.split(",")] if text else []
        if "" in names or len(set(names)) < len(names):
            raise ValueError("must be NAME or NAME:PATH, each name once, with commas between")
        return text

    @field_validator("metrics")
    @classmethod
    def _known_metrics(cls, text: str) -> str:
        for name in _between_commas(text):
            if name not in METRICS:
                raise ValueError(f"{name!r} {no_choice(name, METRICS)}")
        return text

    def others(self) -> dict[str, str]:
        """Return the paths of the other data sets by name; "": the hub, or the package."""
        parts = [part.partition(":") for part in self.on.split(",") if part]
        return {name: path for name, _, path in parts}

    @property
    def names(self) -> tuple[str, ...]:
        """The metrics asked for, each once; they are of test images, where those are read."""
        asked = self.metrics if self.split == "test" else ""
        return tuple(dict.fromkeys(_between_commas(asked)))


def _between_commas(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


class Settings(LearningSettings):
    """Everything a run was asked to do; `tables` holds the sections of methods by their names."""

    method: str = setting("pfedmoap", "what is learned, a module of pfedmoap_flwr/methods")
    fraction_train: float = setting(1.0, "fraction r of the clients that train", above=0, high=1)
    eval_every: int = setting(1, "evaluate all clients after every n-th round", low=1)
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where clients compute")
    clients_at_once: int = setting(
        0, "clients that an in-process run trains at once; 0: what memory and cores allow", low=0
    )
    min_nodes: int = setting(2, "start when so many SuperNodes are connected", low=1)
    node_timeout: float = setting(600.0, "seconds to wait for SuperNodes and for replies", above=0)
    log_format: Literal["text", "json"] = setting("text", "of this program's own log lines")
    tracker: Literal["none", "tensorboard", "trackio", "mlflow", "wandb"] = setting(
        "none", "where the run's numbers go besides its folder"
    )
    state_dir: FilePath = setting("", "where clients keep their state; empty: ~/.pfedmoap/clients")
    run_dir: FilePath = setting("", "results folder; empty: runs/<time>-<method>-<dataset>-s<seed>")
    resume: FilePath = setting("", "results folder of a run to continue")
    clip: ClipSettings = ClipSettings()
    data: DataSettings = DataSettings()
    server: ServerSettings = ServerSettings()
    eval: EvalSettings = EvalSettings()
    tables: Mapping[str, Section] = Field(
        default_factory=lambda values: {values["method"]: methods.load(values["method"]).section()},
        exclude=True,
    )

    @field_validator("method")
    @classmethod
    def _there_is_such_a_method(cls, name: str) -> str:
        if name not in methods.names():
            if methods.outside.is_file_name(name):
                raise ValueError(NO_FILE)
            raise ValueError(no_choice(name, methods.names()))
        return name

    def __hash__(self) -> int:
        return hash(tuple(self.flat().items()))

    @property
    def own(self) -> Any:
        """The chosen method's section, an empty one where it has no settings."""
        return self.tables[self.method]

    def flat(self) -> dict[str, Value]:
        """Return all settings as Flower's flat configuration; of methods, those in `tables`."""
        flat = _in_order(super().flat())
        return flat | flatten({name: table.flat() for name, table in self.tables.items()})

    def replace(self, flat: Mapping[str, Value]) -> "Settings":
        """Return a copy with some flat keys set."""
        return parse({**self.flat(), **flat})


def parse(flat: Mapping[str, Value]) -> Settings:
    """Make Settings from a flat configuration; keys that are left out keep their defaults.

    Equal configurations give the same object: every message of a run brings the same one.

    Raises UsageError naming the key for an unknown key, a wrong type, an impossible value.
    """
    if not all(isinstance(value, Value) for value in flat.values()):
        return _parse(flat)  # raises: a list or a date of a file is no setting (nor hashable)
    # With its type: True equals 1, and the cache would return the settings of the other one
    return _parse_once(tuple((key, type(value), value) for key, value in flat.items()))


@functools.lru_cache(maxsize=64)
def _parse_once(items: tuple[tuple[str, type, Value], ...]) -> Settings:
    return _parse({key: value for key, _, value in items})


def _parse(flat: Mapping[str, Value]) -> Settings:
    reject_unknown(flat, known_fields(_meant_methods(flat)))
    settings = build(Settings, flat)
    present = {settings.method, *(key.partition(".")[0] for key in flat)}
    tables = {
        name: build(methods.load(name).section, flat, f"{name}.")
        for name in methods.names()
        if name in present
    }
    return settings.model_copy(update={"tables": tables})


def parse_words(words: list[str]) -> dict[str, Value]:
    """Read KEY=VALUE words of a command line as a flat configuration.

    A value is read as its setting's type: `seed=1` a whole number, `lr=1` a number.
    """
    flat: dict[str, Value] = {}
    for word in words:
        key, separator, text = word.partition("=")
        if not separator:
            raise UsageError(f"{shown(word)} is not KEY=VALUE, as in local-epochs=1")
        known = known_fields(_meant_methods([key]))
        reject_unknown([key], known)
        flat[key] = _read(key, text.strip().strip("\"'"), known[key])
    return flat


def parse_file(path: Path) -> dict[str, Value]:
    """Read a TOML file of settings, tables and all, as a flat configuration.

    `table1` means the file of that name that comes with us, where there is no such file here.
    Raises UsageError naming the file, and the key where one is wrong.
    """
    path = _conf_file(path)
    try:
        flat = flatten(tomllib.loads(path.read_text()))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UsageError(f"{path}: not TOML ({error})") from error
    except RecursionError:
        raise UsageError(f"{path}: not settings (tables or lists nested too deep)") from None
    try:
        parse(flat)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    return flat


def _conf_file(path: Path) -> Path:
    """Return this path, or conf/NAME.toml of a clone or of a wheel where a bare name is no file."""
    if path.exists() or path.parent != Path():
        return path
    ours = shipped()
    if path.suffix == ".toml" or path.name in ours:
        return ours.get(path.stem, path)
    near = difflib.get_close_matches(path.name, ours, n=1, cutoff=0.0)
    hint = f"; of those that come with pfedmoap {near[0]} is the nearest" if near else ""
    raise UsageError(f"--conf {path}: no such file{hint}")


def shipped() -> dict[str, Path]:
    """Return the files of conf/ by name: a clone's, or those that came with the package."""
    folders = (Path(__file__).parents[1], Path(__file__).parent)
    return {file.stem: file for folder in folders for file in folder.glob("conf/*.toml")}


def absolute(flat: Mapping[str, Value]) -> dict[str, Value]:
    """Return a flat configuration whose paths are absolute: processes start in other folders.

    A text that may be something else than a path, as the name of weights, is one where a file is
    called so. Raises UsageError where a path is impossible.
    """
    known = known_fields(_meant_methods(flat))
    paths = {
        key: path_of(key, text)
        for key, text in flat.items()
        if key in known and is_path(known[key]) and isinstance(text, str) and text
    }
    return {
        **flat,
        **{k: str(path) for k, path in paths.items() if k in ALWAYS_PATHS or path.is_file()},
    }


def known_keys() -> dict[str, str]:
    """Return {key: help} of every setting there is. All methods are imported."""
    return {key: help_line(field) for key, field in known_fields(methods.names()).items()}


def known_fields(names: Iterable[str]) -> dict[str, FieldInfo]:
    """Return {key: field} of the settings of every run, and of some methods, which are imported."""
    known = _in_order(fields(Settings))
    for name in names:
        known |= fields(methods.load(name).section, f"{name}.")
    return known


def _meant_methods(keys: Iterable[str]) -> list[str]:
    """Return the methods whose settings the keys name, or nearly name."""
    sections = {key.partition(".")[0] for key in fields(Settings) if "." in key}
    words = [*sections, *methods.names()]
    named = {key.partition(".")[0] for key in keys if "." in key}
    # Nothing is nearer to a right name than itself; difflib takes longer for it than all the rest
    near = {
        word
        for name in named
        for word in ([name] if name in words else difflib.get_close_matches(name, words, n=1))
    }
    return [name for name in methods.names() if name in near]


def _in_order(flat: dict[str, T]) -> dict[str, T]:
    return {key: flat[key] for key in FIRST} | flat


def _read(key: str, text: str, field: FieldInfo) -> Value:
    kind: Any = field.annotation
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return kind(text) if kind in (int, float) else text
    except (KeyError, ValueError):
        raise UsageError(f"setting {key}={shown(text)}: must be {NOUNS[kind]}") from None


def toml(
    flat: Mapping[str, Value], root: str = "", comments: Mapping[str, str] | None = None
) -> str:
    """Return a flat configuration as TOML tables below `root`, with a comment after each key."""
    groups: dict[str, list[str]] = {}
    for key, value in flat.items():
        table, _, name = key.rpartition(".")
        comment = f"  # {comments[key]}" if comments else ""
        groups.setdefault(table, []).append(f"{name} = {to_toml(value)}{comment}")
    blocks = []
    for table, lines in groups.items():
        title = ".".join(part for part in (root, table) if part)
        blocks.append("\n".join([f"[{title}]"] * bool(title) + lines))
    return "\n\n".join(blocks) + "\n"


def pyproject_table() -> str:
    """Return Flower's configuration table with every default and its help."""
    defaults = {key: field.default for key, field in known_fields(methods.names()).items()}
    return toml(defaults, FLOWER_TABLE, known_keys())


def write_pyproject(path: Path) -> None:
    """Replace the settings tables at the end of a pyproject.toml."""
    text = path.read_text()
    head = re.split(rf"^\[{re.escape(FLOWER_TABLE)}", text, maxsplit=1, flags=re.MULTILINE)[0]
    path.write_text(head.rstrip("\n") + "\n\n" + pyproject_table())


def to_toml(value: Value) -> str:
    """Return a value as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


if __name__ == "__main__":
    write_pyproject(Path(__file__).parent.parent / "pyproject.toml")
