"""Tables from the hub, or from a local copy of the same schema, through `datasets`.

Images stay encoded in Arrow files that are mapped into memory, however large the set is.
"""

import contextlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import huggingface_hub.constants

from pfedmoap_flwr.data import SPLITS
from pfedmoap_flwr.data.catalogue import Source
from pfedmoap_flwr.data.labels import SPLIT_NAMES
from pfedmoap_flwr.errors import UsageError

DEEPEST = 3
"""Folders where a copy's Parquet files may lie: at the deepest CONFIG/SPLIT/x.parquet."""
logger = logging.getLogger("flwr.pfedmoap")


def from_hub(source: Source) -> dict[str, datasets.Dataset]:
    """Return the published tables. Raises UsageError where they cannot be had, and says how."""
    if not source.hub:
        raise UsageError(
            f"setting data.name={source.name!r}: the hub has no table of it; get its images and "
            "set data.path to their folder, DOMAIN/CLASS/x.jpg (docs/data.md)"
        )
    logger.info("%s: loading %s from the hub or its cache", source.name, source.hub)
    try:
        with _quiet():
            found = datasets.load_dataset(source.hub)
    except (OSError, RuntimeError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        gated = any(word in reason.lower() for word in ("gated", "authenticated", "401", "403"))
        terms = "accept its terms on its page and log in with `hf auth login`; " if gated else ""
        raise UsageError(
            f"setting data.name={source.name!r}: {source.hub} cannot be loaded from the hub "
            f"({reason[:160]}); {terms}set data.path to a local copy of it, or HF_HUB_OFFLINE=1 "
            "where it is in the cache"
        ) from error
    return _splits(found, source)


def is_cached(source: Source) -> bool:
    """Tell whether the published tables lie ready in the cache; the hub is not asked."""
    owner, _, name = source.hub.partition("/")
    folder = f"{owner}___{datasets.naming.camelcase_to_snakecase(name)}"
    versions = Path(datasets.config.HF_DATASETS_CACHE).glob(f"{folder}/*/*/*/dataset_info.json")
    return bool(source.hub) and any(v.parent.suffix != ".incomplete" for v in versions)


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Keep to what is on this machine, as with HF_HUB_OFFLINE=1."""
    places: tuple[Any, ...] = (huggingface_hub.constants, datasets.config)
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


def is_table(path: Path) -> bool:
    """Tell whether a folder holds what `save_to_disk` wrote, or Parquet files."""
    # Not below: where the path is a whole disk by mistake, that would take minutes
    patterns = ("*/" * depth + "*.parquet" for depth in range(DEEPEST))
    return _is_saved(path) or any(next(path.glob(p), None) is not None for p in patterns)


def from_copy(path: Path, source: Source) -> dict[str, datasets.Dataset]:
    """Return the tables of a folder. Raises UsageError where they are not what is expected."""
    try:
        if _is_saved(path):
            found = datasets.load_from_disk(str(path))
        else:
            found = datasets.load_dataset(str(path))
    except (OSError, RuntimeError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{_place(path)} cannot be read: {reason[:160]}") from error
    return _splits(found, source)


def revision(tables: dict[str, datasets.Dataset]) -> str:
    """Return what names the version of tables: the hub's commit, or a hash of a copy's files."""
    files = tables["train"].cache_files
    name = Path(files[0]["filename"]).parent.name if files else ""
    return name if re.fullmatch("[0-9a-f]{16,}", name) else ""


def _is_saved(path: Path) -> bool:
    return any((path / name).exists() for name in ("dataset_dict.json", "state.json"))


def _place(path: Path) -> str:
    return f"setting data.path={str(path)!r}:"


def _splits(
    found: datasets.Dataset | datasets.DatasetDict, source: Source
) -> dict[str, datasets.Dataset]:
    tables = found if isinstance(found, datasets.DatasetDict) else {"train": found}
    if source.is_open:
        tables = {SPLIT_NAMES.get(split, split): t for split, t in tables.items()}
    if missing := [split for split in source.splits if split not in tables]:
        raise UsageError(
            f"{source.name}: expected splits {', '.join(source.splits)}; found "
            f"{', '.join(tables)}, without {', '.join(missing)}"
        )
    return {split: tables[split] for split in SPLITS if split in tables}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the hub's client from writing a line for each of its attempts."""
    before = huggingface_hub.logging.get_verbosity()
    huggingface_hub.logging.set_verbosity_error()
    try:
        yield
    finally:
        huggingface_hub.logging.set_verbosity(before)
