"""Tables from files: trees of images, CSV, CoOp's layout, idx files.

A tree is `[SPLIT/][DOMAIN/]CLASS/image`. Images stay paths until they are read.
"""

import csv
import dataclasses
import gzip
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np

from pfedmoap_flwr.data.catalogue import CoopLayout, Source
from pfedmoap_flwr.data.groups import GROUP
from pfedmoap_flwr.data.labels import SPLIT_NAMES
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.logs import Slow
from pfedmoap_flwr.settings import shown

DICOM = ".dcm"
SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"),
    DICOM,
)
MOST_OTHERS = 10_000
"""Files and folders that are seen before the first image; a second's work, and no data set's."""
IDX_IMAGES, IDX_LABELS = 0x803, 0x801

Row = tuple[str, str, str, str]
"""Split, path, class, domain."""


def read_tree(root: Path) -> list[Row]:
    """Return the images below a folder.

    Raises UsageError where they do not lie in classes, or a link leads to a folder a second time.
    """
    rows: list[Row] = []
    shapes: dict[int, str] = {}
    slow, seen = Slow("reading %s: %d images among %d files and folders so far"), 0
    for folder, files in _folders(root):
        slow.at(root, len(rows), seen)
        seen += 1 + len(files)
        images = [f for f in sorted(files) if f.lower().endswith(SUFFIXES) and f[0] != "."]
        if not rows and not images and seen >= MOST_OTHERS:
            raise UsageError(
                f"setting data.path={str(root)!r}: no image is among the first {seen:,} files and "
                f"folders there, up to {readable(folder)}; give the folder where images lie as "
                "CLASS/x.jpg"
            )
        for file in images:
            parts = Path(folder, file).relative_to(root).parts[:-1]
            split = SPLIT_NAMES.get(parts[0].lower(), "") if parts else ""
            above = parts[1:] if split else parts
            shapes.setdefault(len(above) + 10 * bool(split), "/".join([*parts, file]))
            # At once, for what is no data set may be a whole disk
            if len(shapes) > 1 or shapes.keys() - {1, 2, 11, 12}:
                raise UsageError(
                    f"setting data.path={str(root)!r}: images must all lie as CLASS/x.jpg or all "
                    "as DOMAIN/CLASS/x.jpg, with or without train/ and test/ above; there is "
                    f"{' and '.join(map(readable, shapes.values()))}"
                )
            domain = above[0] if len(above) == 2 else ""
            image = os.path.join(folder, file)
            rows.append((split, readable(image), readable(above[-1] if above else ""), domain))
    return [(split or "train", *rest) for split, *rest in rows]  # type: ignore[misc]


def _folders(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder below a root, in order, links followed, with the names of its files.

    Raises UsageError at a folder that was there before: links may lead around for ever.
    """
    seen: dict[tuple[int, int], str] = {}
    for folder, folders, files in os.walk(root, followlinks=True):
        try:
            status = os.stat(folder)
        except OSError:  # it has gone meanwhile
            continue
        first = seen.setdefault((status.st_dev, status.st_ino), folder)
        if first != folder:
            raise UsageError(
                f"setting data.path={str(root)!r}: {readable(folder)} is {readable(first)} again, "
                "by a link; remove the link"
            )
        folders.sort()
        yield folder, files


def readable(name: str) -> str:
    """Return a file's name as text, bytes that are not UTF-8 as \\xe9: no file is called so."""
    return os.fsencode(name).decode(errors="backslashreplace")


def read_csv(path: Path, group_column: str = "") -> tuple[list[Row], list[str]]:
    """Return the images that a CSV lists, and each one's group, "" where no column has any.

    Its columns are path, label and maybe split, domain and the groups'. Paths are relative to the
    CSV. Raises UsageError for other columns, and for an unnamed class or group, an unknown split or
    what is no CSV with its line.
    """
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.DictReader(file)
        try:
            return _listed(path, reader, group_column)
        except csv.Error as error:
            raise UsageError(
                f"setting data.path={str(path)!r}, line {reader.line_num + 1}: no CSV ({error})"
            ) from error


def _listed(
    path: Path, reader: "csv.DictReader[str]", group_column: str
) -> tuple[list[Row], list[str]]:
    """Return the rows and groups of `read_csv`."""
    columns = reader.fieldnames or []
    needed = ["path", "label", *([group_column] if group_column else [])]
    if not set(needed) <= set(columns) <= {*needed, "split", "domain"}:
        raise UsageError(
            f"setting data.path={str(path)!r}: expected columns {', '.join(needed)} and maybe "
            f"split, domain; found {shown(', '.join(columns))}; data.group-column names one of "
            "groups, as patients"
        )
    rows, groups = [], []
    for line in reader:
        split = (line.get("split") or "train").strip().lower()
        nul = any("\0" in str(value) for value in line.values())
        if nul or split not in SPLIT_NAMES or not all(line[name] for name in needed):
            cells = ", ".join(f"a {name}" for name in needed)
            raise UsageError(
                f"setting data.path={str(path)!r}, line {reader.line_num}: needs {cells}, a split "
                f"among {', '.join(SPLIT_NAMES)}; found {shown([*line.values()])}"
            )
        image = str(path.parent / line["path"])
        rows.append((SPLIT_NAMES[split], image, line["label"], line.get("domain") or ""))
        groups.append(line[group_column] if group_column else "")
    return rows, groups


def find_coop(path: Path, layout: CoopLayout) -> Path | None:
    """Return the data set's folder in CoOp's layout: the path, or a folder in it."""
    places = [path, path / layout.folder, path / layout.folder.replace("-", "")]
    return next((place for place in places if (place / layout.split).is_file()), None)


def read_coop(folder: Path, layout: CoopLayout) -> list[Row]:
    """Return the images of CoOp's own split: [relative path, number, class name] in three lists.

    Its numbers are not read: classes are joined by name. Raises UsageError where images are absent.
    """
    content = json.loads((folder / layout.split).read_text())
    rows = [
        (SPLIT_NAMES[split], str(folder / layout.images / image), name, "")
        for split, listed in content.items()
        for image, _, name in listed
    ]
    if absent := [image for _, image, _, _ in rows if not os.path.exists(image)]:
        raise UsageError(
            f"{len(absent)} of {len(rows)} images of {folder / layout.split} are not there; the "
            f"first is {absent[0]}"
        )
    return rows


def to_tables(rows: Sequence[Row], groups: Sequence[str] = ()) -> dict[str, datasets.Dataset]:
    """Return tables of image (a path, decoded when read), label and domain, one a split.

    groups: of each row, where a column GROUP is to hold them.
    """
    text = datasets.Value("string")
    names = ("image", "label", "domain", *([GROUP] if groups else []))
    features = datasets.Features(dict.fromkeys(names, text))
    of_rows: Sequence[tuple[str, ...]] = [(group,) for group in groups] or [()] * len(rows)
    tables = {}
    for split in dict.fromkeys(["train", *(row[0] for row in rows)]):
        chosen = [
            (*row[1:], *group) for row, group in zip(rows, of_rows, strict=True) if row[0] == split
        ]
        columns = zip(names, zip(*chosen, strict=True), strict=False)
        content = {name: list(values) for name, values in columns}
        content = content or {name: [] for name in features}
        table = datasets.Dataset.from_dict(content, features=features)
        tables[split] = table.cast_column("image", datasets.Image())
    return tables


def as_read(source: Source) -> Source:
    """Return a source with the columns that `to_tables` writes."""
    return dataclasses.replace(source, image="image", label="label", domain="domain")


def has_idx(path: Path) -> bool:
    """Tell whether a folder holds MNIST's kind of files."""
    return next(path.glob("*-images-idx3-ubyte*"), None) is not None


def read_idx(folder: Path, names: Sequence[str]) -> dict[str, datasets.Dataset]:
    """Return the tables of idx files (plain or .gz), labels named by position in `names`.

    An image is its pixels behind a PGM header. Raises UsageError where a file is not what it says.
    """
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))}
    )
    tables = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = _idx(folder, f"{prefix}-images-idx3-ubyte", IDX_IMAGES)
        labels = _idx(folder, f"{prefix}-labels-idx1-ubyte", IDX_LABELS)
        if len(images) != len(labels) or labels.max(initial=0) >= len(names):
            raise UsageError(f"{folder}: {prefix} images and labels do not belong together")
        header = b"P5 %d %d 255\n" % (images.shape[2], images.shape[1])
        content = [{"bytes": header + image.tobytes(), "path": None} for image in images]
        rows = {"image": content, "label": labels.tolist()}
        tables[split] = datasets.Dataset.from_dict(rows, features=features)
    return tables


def _idx(folder: Path, name: str, magic: int) -> np.ndarray:
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise UsageError(f"setting data.path={str(folder)!r}: no {name} or {name}.gz there")
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        content = file.read()
    dimensions = magic & 0xFF
    head = np.frombuffer(content[: 4 * (1 + dimensions)], ">u4")
    pixels = np.frombuffer(content, np.uint8, offset=4 * (1 + dimensions))
    if len(head) <= dimensions or head[0] != magic or head[1:].prod() != len(pixels):
        raise UsageError(f"{path} is not an idx file, or is cut off")
    return pixels.reshape(head[1:])
