"""The settings on a command line: read and checked before anything heavy is imported."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from pfedmoap_flwr import methods
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.settings import Span, Value


def read(
    settings: Sequence[str] | None, conf: Sequence[Path] | None, method: str | None = None
) -> dict[str, Value]:
    """Return what the command line sets: files, each over those before it, KEY=VALUE words over
    them, --method over all.

    --method may be a file, whose settings are known from then on. Paths are absolute.

    Raises UsageError for an unknown key or an impossible value, and for a file that is no method.
    """
    from pfedmoap_flwr import config

    # First of all: a file brings settings of its own
    method = None if method is None else methods.named(method)
    values: dict[str, Value] = {}
    for path in conf or ():
        values |= config.parse_file(path)
    values |= config.parse_words(list(settings or ()))
    if method is not None:
        values["method"] = method
    config.parse(values)
    return config.absolute(values)


def read_methods(text: str) -> list[str]:
    """Return the methods between commas, names or files; all of them for "all".

    Raises UsageError where a file is no method.
    """
    return list(methods.names()) if text == "all" else list(map(methods.named, text.split(",")))


def read_seeds(text: str) -> list[int]:
    """Return the seeds between commas, 0-4 being five of them.

    Raises UsageError where one is no seed.
    """
    from pfedmoap_flwr import config

    seeds: list[int] = []
    for part in text.split(","):
        ends = part.split("-") if re.fullmatch(r"[0-9]+-[0-9]+", part) else [part]
        first, last = (config.parse(config.parse_words([f"seed={ends[i]}"])).seed for i in (0, -1))
        if first > last:
            raise UsageError(f"--seeds {part}: a range goes up, as 0-4 does")
        seeds += range(first, last + 1)
    return seeds


def read_sweeps(words: Sequence[str], option: str = "--sweep") -> dict[str, list[Value]]:
    """Return the values of each setting that is swept, from KEY=VALUE,VALUE words.

    Raises UsageError for an unknown key, an impossible value, or a value twice.
    """
    from pfedmoap_flwr import config

    sweeps: dict[str, list[Value]] = {}
    for word in words:
        key, sign, values = word.partition("=")
        if not sign or key in sweeps or key in ("method", "seed"):
            raise UsageError(
                f"{option} {word}: must be KEY=VALUE,VALUE, each key once; methods and seeds have "
                "options of their own"
            )
        read = [config.parse_words([f"{key}={value}"])[key] for value in values.split(",")]
        for value in read:
            config.parse({key: value})
        if len(set(read)) < len(read):
            raise UsageError(f"{option} {word}: has a value twice")
        sweeps[key] = read
    return sweeps


def read_search(words: Sequence[str]) -> dict[str, Span | list[Value]]:
    """Return what settings are searched in: KEY=LOW..HIGH, KEY=LOW..HIGH:log, or KEY=VALUE,VALUE.

    Raises UsageError for an unknown key, an impossible value, or an empty span.
    """
    search: dict[str, Span | list[Value]] = {}
    listed: list[str] = []
    for word in words:
        key, _, text = word.partition("=")
        if ".." not in text:
            listed.append(word)
            continue
        ends, _, scale = text.partition(":")
        low, high = (_number(word, key, end) for end in ends.split("..", 1))
        log = scale == "log"
        if low >= high or scale not in ("", "log") or (log and low <= 0) or key in search:
            raise UsageError(
                f"--search {word}: must be KEY=LOW..HIGH, each key once, LOW below HIGH; with :log "
                "behind it both are above 0"
            )
        search[key] = Span(low, high, log, isinstance(low, int))
    if not words:
        raise UsageError("--search: say what is searched, as in --search lr=0.0005..0.02:log")
    values = read_sweeps(listed, "--search")
    if twice := values.keys() & search.keys():
        raise UsageError(f"--search {min(twice)}: each key once")
    return search | values


def _number(word: str, key: str, text: str) -> int | float:
    from pfedmoap_flwr import config

    value = config.parse_words([f"{key}={text}"])[key]
    config.parse({key: value})
    if isinstance(value, str | bool):
        raise UsageError(f"--search {word}: {key} is no number; name its values, with commas")
    return value


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
