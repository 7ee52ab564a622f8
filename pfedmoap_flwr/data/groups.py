"""Images that belong together, as those of a patient: a group is never divided.

Groups are drawn as images are: a table with a row for each group stands in the images' place, and
what was drawn of it is put back into images. A group counts as its most frequent class and domain.
"""

import os
import re
from collections.abc import Mapping, Sequence

import datasets
import numpy as np
import pyarrow as pa

from pfedmoap_flwr.data.labels import listed
from pfedmoap_flwr.errors import UsageError

GROUP = "data.group"
"""The column of tables with groups; called so, no data set has it unasked."""


def found_in_paths(paths: Sequence[str], root: str, pattern: str) -> list[str]:
    """Return the group of each image by its path below the root: the pattern's first parentheses.

    Without parentheses it is all that the pattern matches. Raises UsageError where it matches
    nothing in a path.
    """
    search, groups = re.compile(pattern).search, []
    for path in paths:
        found = search(os.path.relpath(path, root))
        group = found and (found[1] if found.re.groups else found[0])
        if not group:
            raise UsageError(f"setting data.group-pattern={pattern!r}: finds no group in {path}")
        groups.append(group)
    return groups


def units(table: datasets.Dataset) -> tuple[datasets.Dataset, list[np.ndarray] | None]:
    """Return a table with a row for each group, without images, and each group's rows.

    Without a column of groups: the table itself, and None.
    """
    if GROUP not in table.column_names:
        return table, None
    names = np.asarray(table.with_format(None)[GROUP][:], dtype=str)
    _, first, inverse = np.unique(names, return_index=True, return_inverse=True)
    order = np.argsort(first)
    members = [np.flatnonzero(inverse == group) for group in order]
    first_rows = table.remove_columns("image").with_format("arrow").select(first[order])
    small = first_rows[:]
    for column in ("label", "domain"):
        values = np.asarray(table.with_format("numpy")[column][:], dtype=np.int64)
        usual = pa.array([int(np.bincount(values[rows]).argmax()) for rows in members])
        small = small.set_column(small.column_names.index(column), column, usual)
    return datasets.Dataset(small), members


def together(members: Sequence[np.ndarray] | None, chosen: np.ndarray) -> np.ndarray:
    """Return the rows of the chosen rows of `units`, in order."""
    if members is None:
        return np.sort(chosen)
    rows = [members[group] for group in chosen.tolist()]
    return np.sort(np.concatenate([*rows, np.empty(0, np.int64)])).astype(np.int64)


def check_whole(tables: Mapping[str, datasets.Dataset]) -> None:
    """Raise UsageError where a group lies in two splits as they were found."""
    seen: dict[str, str] = {}
    for split, table in tables.items():
        if GROUP not in table.column_names:
            continue
        names = set(table.with_format(None)[GROUP][:])
        if twice := sorted(name for name in names if name in seen):
            raise UsageError(
                f"group {listed(twice)} lies in {seen[twice[0]]} and in {split}; what a model was "
                "trained on must not test it: put each group's images into one split"
            )
        seen |= dict.fromkeys(names, split)
