"""Settings: typed, checked before anything runs, and the same table in pyproject.toml."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from pfedmoap_flwr import config, methods
from pfedmoap_flwr.errors import UsageError

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


def flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        inner = isinstance(value, dict)
        flat |= flatten(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return flat


def test_pyproject_holds_exactly_the_defaults() -> None:
    table = tomllib.loads(PYPROJECT.read_text())["tool"]["flwr"]["app"]["config"]
    written, defaults = flatten(table), config.Settings().flat()
    assert written == defaults
    assert {k: type(v) for k, v in written.items()} == {k: type(v) for k, v in defaults.items()}


def test_every_setting_has_a_help_line() -> None:
    assert all(config.known_keys().values())
    assert config.known_keys().keys() == config.Settings().flat().keys()


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
    assert methods.load("pfedmoap")(settings).own.num_experts == 3
    assert config.parse({"method": "promptfl"}).own is None


def test_replace_keeps_what_it_does_not_name() -> None:
    settings = config.parse({"seed": 7, "pfedmoap.lambda": 2.0}).replace({"lr": 0.5})
    assert (settings.seed, settings.lr, settings.tables["pfedmoap"].lambda_) == (7, 0.5, 2.0)
