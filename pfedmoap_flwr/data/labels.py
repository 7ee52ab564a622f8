"""From tables with names to tables with numbers: labels and domains are joined by name.

A table is a `datasets.Dataset` with an image column and columns of names (ClassLabel or text) for
the class and, where there is one, the domain. Nothing here decodes or copies an image.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import datasets
import numpy as np

from pfedmoap_flwr.data.catalogue import FOLDER, Source
from pfedmoap_flwr.errors import UsageError

MOST_CLASSES = 50_000  # every sentence of every class goes through the text tower
SHOWN = 5  # names in a message, before the rest is only counted

SPLIT_NAMES = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "test": "test",
}

Tables = Mapping[str, datasets.Dataset]


def join(
    tables: Tables, source: Source, given: Sequence[str] = ()
) -> tuple[dict[str, datasets.Dataset], tuple[str, ...], tuple[str, ...]]:
    """Return tables with columns image, label, domain (integers), the class and domain names.

    Other columns stay as they are. Labels are joined by name: the names found, made readable, must
    be the published ones, or among those `given`, or else become the list, sorted.

    Raises UsageError for other columns, and for other names, with the difference.
    """
    for split, table in tables.items():
        check_columns(split, table, source)
    names = {split: _names(table, source.label) for split, table in tables.items()}
    for split, (_, rows) in names.items():
        if nameless := int((rows < 0).sum()):
            raise UsageError(f"{source.name}, {split}: {nameless} images have no {source.label}")
    classnames = _classnames(set().union(*(kinds for kinds, _ in names.values())), source, given)
    if len(classnames) > MOST_CLASSES:
        raise UsageError(
            f"{source.name}: {len(classnames)} classes; at most {MOST_CLASSES} are read"
        )
    number = {name.casefold(): label for label, name in enumerate(classnames)}
    domains = {
        split: _names(table, source.domain)
        for split, table in tables.items()
        if source.domain in table.column_names
    }
    domain_names = tuple(
        sorted({d for kinds, rows in domains.values() for d in _used(kinds, rows)})
    )
    joined = {}
    for split, table in tables.items():
        kinds, rows = names[split]
        new = [number.get(source.readable(kind).casefold(), -1) for kind in kinds]
        label = np.array(new, dtype=np.int64)[rows]
        domain = np.zeros(len(table), dtype=np.int64)
        if split in domains:
            kinds, rows = domains[split]
            index = {kind: domain_names.index(kind) for kind in _used(kinds, rows)}
            domain = np.array([index.get(kind, -1) for kind in kinds], dtype=np.int64)[rows]
        joined[split] = _labelled(table, source, label, domain)
    return joined, classnames, domain_names or ("",)


def choose_columns(tables: Tables, source: Source, image: str, label: str) -> Source:
    """Return the source with its columns: those named, or the only one of its kind.

    Raises UsageError that shows the columns where one is neither.
    """
    features = next(iter(tables.values())).features
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    classes = [name for name, f in features.items() if isinstance(f, datasets.ClassLabel)]
    texts = [name for name, feature in features.items() if _is_names(feature)]

    def choose(what: str, name: str, only: list[str], possible: list[str]) -> str:
        if name in possible:
            return name
        if not name and len(only) == 1:
            return only[0]
        found = ", ".join(f"{column} ({_kind(f)})" for column, f in features.items())
        given = f"={name!r}" if name else ""
        raise UsageError(
            f"setting data.{what}-column{given}: {source.name} has columns {found}; name the one "
            f"with the {'images' if what == 'image' else 'names of classes'}"
        )

    chosen = choose("image", image, images, images), choose("label", label, classes, texts)
    return replace(source, image=chosen[0], label=chosen[1])


def check_columns(split: str, table: datasets.Dataset, source: Source) -> None:
    """Raise UsageError that shows the columns expected and found."""
    features = table.features
    expected = {source.image: "Image", source.label: "class names"}
    if source.domain and (source.name != FOLDER or source.domain in features):
        expected[source.domain] = "domain names"
    good = isinstance(features.get(source.image), datasets.Image) and all(
        _is_names(features.get(column)) for column in expected if column != source.image
    )
    if not good:
        wanted = ", ".join(f"{column} ({kind})" for column, kind in expected.items())
        found = ", ".join(f"{name} ({_kind(feature)})" for name, feature in features.items())
        raise UsageError(f"{source.name}, {split}: expected columns {wanted}; found {found}")


def _names(table: datasets.Dataset, column: str) -> tuple[list[str], np.ndarray]:
    """Return the names that a column may have, and which one each row has, -1 for none."""
    feature = table.features[column]
    values = table.select_columns([column]).with_format("arrow")[:][column].combine_chunks()
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names), values.fill_null(-1).to_numpy(zero_copy_only=False)
    encoded = values.dictionary_encode()
    rows = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    return encoded.dictionary.to_pylist(), rows


def _used(kinds: Sequence[str], rows: np.ndarray) -> list[str]:
    return [kinds[i] for i in np.unique(rows) if i >= 0]


def _classnames(found: set[str], source: Source, given: Sequence[str]) -> tuple[str, ...]:
    """Return the class list, checked against the published or the given one."""
    readable = {source.readable(name) for name in found - set(source.dropped)}
    if source.classnames:
        expected = {name.casefold() for name in source.classnames}
        lower = {name.casefold(): name for name in readable}
        extra = [] if source.subset else [lower[n] for n in lower.keys() - expected]
        missing = [n for n in source.classnames if n.casefold() not in lower]
        if extra or missing:
            raise UsageError(
                f"{source.name}: the class names are not the published ones: "
                f"{difference(missing, extra)}"
            )
        return source.classnames
    if given:
        agreed = {name.casefold() for name in given}
        if extra := [name for name in readable if name.casefold() not in agreed]:
            raise UsageError(
                f"class {listed(extra)} of the images is not in setting data.classnames, which has "
                f"{listed(given)}"
            )
        return tuple(given)
    by_spelling: dict[str, str] = {}
    for name in sorted(readable):
        by_spelling.setdefault(name.casefold(), name)
    return tuple(sorted(by_spelling.values()))


def difference(missing: Iterable[str], extra: Iterable[str]) -> str:
    """Return "missing 'a'; extra 'b', 'c'" with the first few names of each."""
    parts = {"missing": sorted(missing), "extra": sorted(extra)}
    return "; ".join(f"{what} {listed(names)}" for what, names in parts.items() if names)


def listed(names: Sequence[str]) -> str:
    """Return "'a', 'b' and 7 more"."""
    shown = ", ".join(repr(name) for name in names[:SHOWN])
    return shown + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _labelled(
    table: datasets.Dataset, source: Source, label: np.ndarray, domain: np.ndarray
) -> datasets.Dataset:
    """Replace the columns of names by integers; rows of classes left out (-1) go."""
    old = [c for c in (source.label, source.domain, "label", "domain") if c in table.column_names]
    table = table.remove_columns(list(dict.fromkeys(old)))
    if source.image != "image":
        table = table.rename_column(source.image, "image")
    # Before rows are selected: `datasets` copies every image to add a column to a selection
    table = table.add_column("label", label.astype(np.int64))
    table = table.add_column("domain", domain.astype(np.int64))
    rows = np.flatnonzero((label >= 0) & (domain >= 0))
    return table if len(rows) == len(table) else table.select(rows)


def _is_names(feature: object) -> bool:
    if isinstance(feature, datasets.ClassLabel):
        return True
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def _kind(feature: object) -> str:
    return str(feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__)
