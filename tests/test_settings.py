"""Settings: typed, checked before anything runs, and the same table in pyproject.toml."""

import subprocess
import sys
import tomllib
from importlib.metadata import version
from typing import Any

import pytest
from pydantic import ValidationError

import pfedmoap_flwr
from pfedmoap_flwr import config, methods
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.settings import Section, fields, setting
from support import ROOT

PYPROJECT = ROOT / "pyproject.toml"


def flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        inner = isinstance(value, dict)
        flat |= flatten(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return flat


def test_pyproject_holds_exactly_the_defaults() -> None:
    table = tomllib.loads(PYPROJECT.read_text())["tool"]["flwr"]["app"]["config"]
    written = flatten(table)
    # Those of each method in turn, as a run takes them that sets nothing else
    defaults = {
        key: value
        for method in methods.names()
        for key, value in config.parse({"method": method}).flat().items()
    }
    defaults["method"] = config.Settings().method
    assert written == defaults
    assert list(written) == list(config.known_keys())
    assert {k: type(v) for k, v in written.items()} == {k: type(v) for k, v in defaults.items()}


def test_every_setting_has_a_help_line() -> None:
    assert all(config.known_keys().values())
    assert config.Settings().flat().keys() <= config.known_keys().keys()


def test_the_paper_is_the_default() -> None:
    flat = config.Settings().flat()
    assert flat["compat"] == "paper"
    assert flat["lr"] == 0.002
    assert flat["local-epochs"] == 5
    assert flat["prompt.n-ctx"] == 16
    assert flat["pfedmoap.gate-lr"] == 0.01
    assert flat["pfedmoap.heads"] == 8
    assert flat["pfedmoap.d-gating"] == 128
    assert flat["pfedmoap.lambda"] == 0.5
    assert flat["pfedmoap.selection"] == "knn"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("local-epoch", 1, ["unknown setting 'local-epoch'", "'local-epochs'"]),
        ("pfedmoap.k", 1, ["unknown setting 'pfedmoap.k'"]),
        ("local-epochs", "five", ["local-epochs='five'", "whole number"]),
        ("local-epochs", 2.5, ["local-epochs=2.5", "whole number"]),
        ("local-epochs", True, ["local-epochs=True", "whole number"]),
        ("local-epochs", 0, ["local-epochs=0", ">= 1"]),
        ("lr", -0.1, ["lr=-0.1", "> 0"]),
        ("lr", float("nan"), ["lr=nan"]),
        ("fraction-train", 1.5, ["fraction-train=1.5", "<= 1"]),
        ("fraction-train", 0.0, ["fraction-train=0.0", "> 0"]),
        ("method", "pfedmoa", ["method='pfedmoa'", "pfedmoap"]),
        ("pfedmoap.selection", "nearest", ["pfedmoap.selection='nearest'", "knn"]),
        ("compat", "code", ["compat='code'", "released"]),
        ("prompt.class-specific", "yes", ["prompt.class-specific='yes'", "true or false"]),
        ("clip.model", 3, ["clip.model=3", "text"]),
    ],
)
def test_a_wrong_setting_is_named_in_one_line(key: str, value: Any, words: list[str]) -> None:
    with pytest.raises(UsageError) as raised:
        config.parse({key: value})
    message = str(raised.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_a_whole_number_is_a_number() -> None:
    assert config.parse({"lr": 1}).lr == 1.0


def test_command_line_words_are_read_as_their_settings_types() -> None:
    words = ["lr=1", "seed=3", "data.name=x", 'clip.model="RN50"', "prompt.class-specific=true"]
    assert config.parse_words(words) == {
        "lr": 1.0,
        "seed": 3,
        "data.name": "x",
        "clip.model": "RN50",
        "prompt.class-specific": True,
    }
    assert type(config.parse_words(["lr=1"])["lr"]) is float


@pytest.mark.parametrize("word", ["seed", "seed=x", "sed=1", "prompt.class-specific=1"])
def test_wrong_words_are_refused(word: str) -> None:
    with pytest.raises(UsageError, match=word.split("=")[0]):
        config.parse_words([word])


def test_a_method_finds_its_own_table() -> None:
    settings = config.parse({"method": "pfedmoap", "pfedmoap.num-experts": 3})
    own: Any = settings.own
    assert own.num_experts == 3
    assert type(own) is methods.load("pfedmoap").section
    assert config.parse({"method": "promptfl"}).own == Section()


def test_replace_keeps_what_it_does_not_name() -> None:
    settings = config.parse({"seed": 7, "pfedmoap.lambda": 2.0}).replace({"lr": 0.5})
    own: Any = settings.tables["pfedmoap"]
    assert (settings.seed, settings.lr, own.lambda_) == (7, 0.5, 2.0)


def test_tables_are_those_of_the_chosen_method_and_of_the_keys_that_are_given() -> None:
    assert set(config.parse({"method": "coop"}).tables) == {"coop"}
    assert config.Settings().tables.keys() == config.parse({}).tables.keys() == {"pfedmoap"}
    both = config.parse({"method": "coop", "pfedmoap.heads": 2})
    assert set(both.tables) == {"coop", "pfedmoap"}
    assert both.flat()["pfedmoap.heads"] == 2
    assert "pfedmoap.heads" not in config.parse({"method": "coop"}).flat()


def test_a_method_shares_its_name_with_no_part() -> None:
    parts = {key.split(".")[0] for key in fields(config.Settings) if "." in key}
    assert parts == {"prompt", "optimizer", "privacy", "clip", "data", "server", "eval"}
    assert parts.isdisjoint(methods.names())
    # Nor may a file of somebody's
    assert parts <= set(methods.outside.TAKEN)


def test_equal_configurations_are_parsed_once() -> None:
    first = config.parse({"lr": 0.25, "seed": 3})
    assert config.parse({"lr": 0.25, "seed": 3}) is first
    assert hash(config.parse({"seed": 3, "lr": 0.25})) == hash(first)


def test_what_was_parsed_before_excuses_no_wrong_type() -> None:
    config.parse({"local-epochs": 1})
    with pytest.raises(UsageError, match="local-epochs=True: must be a whole number"):
        config.parse({"local-epochs": True})


def test_a_slip_in_a_methods_name_still_finds_its_key() -> None:
    with pytest.raises(UsageError, match=r"unknown setting 'pfedmaop\.head'.*'pfedmoap\.heads'"):
        config.parse({"pfedmaop.head": 2})


class Inner(Section):
    rate: float = setting(0.5, "a rate", low=0, high=1)


class Outer(Section):
    inner: Inner = Inner()
    lambda_: float = setting(1.0, "a weight", above=0)
    colour: str = setting("red", "a colour", choices=("red", "green"))


def test_a_section_is_frozen_hashable_and_strict() -> None:
    assert hash(Outer()) == hash(Outer())
    assert Outer(lambda_=2) == Outer(lambda_=2.0)
    assert Outer().flat() == {"lambda": 1.0, "colour": "red", "inner.rate": 0.5}
    assert list(fields(Outer, "x.")) == ["x.lambda", "x.colour", "x.inner.rate"]
    with pytest.raises(ValidationError):
        Outer().colour = "green"
    for wrong in (
        {"lambda_": "2"},
        {"lambda_": True},
        {"lambda_": 0},
        {"colour": "blue"},
        {"x": 1},
    ):
        with pytest.raises(ValidationError):
            Outer(**wrong)


# In a process of its own: here, all of this is imported already
REFUSED = """
import sys
from pfedmoap_flwr import config
from pfedmoap_flwr.errors import UsageError
for attempt in (
    lambda: config.parse({"loca-epochs": 1}),
    lambda: config.parse({"lr": -1.0}),
    lambda: config.parse({"method": "fedavg"}),
    lambda: config.parse({"data.partition": "even"}),
    lambda: config.parse_words(["data.alphaa=1"]),
    lambda: config.parse_words(["clip.model=ViT-B-16", "prompt.n-ctx=many"]),
):
    try:
        attempt()
    except UsageError:
        continue
    raise SystemExit("not refused")
print(*{"torch", "flwr", "datasets", "open_clip"} & set(sys.modules))
config.parse({"method": "coop"})
print("torch" in sys.modules, "pfedmoap_flwr.methods.pfedmoap" in sys.modules)
"""


@pytest.mark.processes
def test_a_wrong_setting_is_refused_before_anything_heavy_is_imported() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", REFUSED], cwd=PYPROJECT.parent, capture_output=True, text=True
    )
    assert ran.stderr == ""
    assert ran.stdout.splitlines() == ["", "True False"]


def test_the_version_is_the_one_that_is_installed() -> None:
    assert pfedmoap_flwr.__version__ == version("pfedmoap-flwr")
