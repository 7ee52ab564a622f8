"""The settings on a command line: read and checked before anything heavy is imported."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from pfedmoap_flwr import methods
from pfedmoap_flwr.settings import Value


def read(
    settings: Sequence[str] | None, conf: Path | None, method: str | None = None
) -> dict[str, Value]:
    """Return what the command line sets: a file, KEY=VALUE words over it, --method over both.

    Raises UsageError for an unknown key or an impossible value.
    """
    from pfedmoap_flwr import config

    values = config.parse_file(conf) if conf else {}
    values |= config.parse_words(list(settings or ()))
    if method is not None:
        values["method"] = method
    config.parse(values)
    return values


def read_seeds(text: str) -> list[int]:
    """Return the seeds between commas. Raises UsageError where one is no seed."""
    from pfedmoap_flwr import config

    words = [config.parse_words([f"seed={seed}"]) for seed in text.split(",")]
    return [config.parse(word).seed for word in words]


def complete_method(start: str) -> list[str]:
    """Return the names of methods that begin so, for the shell."""
    return [name for name in methods.names() if name.startswith(start)]


def complete_setting(start: str) -> Iterator[tuple[str, str]]:
    """Yield (KEY=, help) of settings that begin so, for the shell."""
    from pfedmoap_flwr import config
    from pfedmoap_flwr.settings import help_line

    section = start.partition(".")[0]
    named = [name for name in methods.names() if name == section]
    for key, field in config.known_fields(named).items():
        if key.startswith(start):
            yield f"{key}=", help_line(field)
