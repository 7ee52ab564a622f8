"""Tables from files: trees of images, CSV, CoOp's layout, idx files; broken images are found.

A tree is `[SPLIT/][DOMAIN/]CLASS/image`. Images stay paths until they are read.
"""

import contextlib
import csv
import dataclasses
import gzip
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from pfedmoap_flwr.cache import cache_folder
from pfedmoap_flwr.data.catalogue import CoopLayout, Source
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.files import replace

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
SPLIT_NAMES = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "test": "test",
}
IDX_IMAGES, IDX_LABELS = 0x803, 0x801

Row = tuple[str, str, str, str]
"""Split, path, class, domain."""


def read_tree(root: Path) -> list[Row]:
    """Return the images below a folder. Raises UsageError where they do not lie in classes."""
    rows: list[Row] = []
    shapes: dict[int, str] = {}
    for folder, folders, files in os.walk(root, followlinks=True):
        folders.sort()
        for file in sorted(files):
            if not file.lower().endswith(SUFFIXES) or file.startswith("."):
                continue
            parts = Path(folder, file).relative_to(root).parts[:-1]
            split = SPLIT_NAMES.get(parts[0].lower(), "") if parts else ""
            above = parts[1:] if split else parts
            shapes.setdefault(len(above) + 10 * bool(split), "/".join([*parts, file]))
            domain = above[0] if len(above) == 2 else ""
            rows.append((split, os.path.join(folder, file), above[-1] if above else "", domain))
    if len(shapes) > 1 or shapes.keys() - {1, 2, 11, 12}:
        raise UsageError(
            f"setting data.path={str(root)!r}: images must all lie as CLASS/x.jpg or all as "
            "DOMAIN/CLASS/x.jpg, with or without train/ and test/ above; there is "
            f"{' and '.join(shapes.values())}"
        )
    return [(split or "train", *rest) for split, *rest in rows]  # type: ignore[misc]


def read_csv(path: Path) -> list[Row]:
    """Return the images that a CSV lists; its columns are path, label and maybe split, domain.

    Paths are relative to the CSV. Raises UsageError for other columns, and for an unnamed class or
    an unknown split with its line.
    """
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        if not {"path", "label"} <= set(columns) <= {"path", "label", "split", "domain"}:
            raise UsageError(
                f"setting data.path={str(path)!r}: expected columns path, label and maybe split, "
                f"domain; found {', '.join(columns)}"
            )
        rows = []
        for line in reader:
            split = (line.get("split") or "train").strip().lower()
            if split not in SPLIT_NAMES or not line["path"] or not line["label"]:
                raise UsageError(
                    f"setting data.path={str(path)!r}, line {reader.line_num}: needs a path, a "
                    f"label, a split among {', '.join(SPLIT_NAMES)}; found {list(line.values())}"
                )
            image = str(path.parent / line["path"])
            rows.append((SPLIT_NAMES[split], image, line["label"], line.get("domain") or ""))
    return rows


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


def to_tables(rows: Sequence[Row]) -> dict[str, datasets.Dataset]:
    """Return tables of image (a path, decoded when read), label and domain, one a split."""
    text = datasets.Value("string")
    features = datasets.Features(dict.fromkeys(("image", "label", "domain"), text))
    tables = {}
    for split in dict.fromkeys(["train", *(row[0] for row in rows)]):
        chosen = [row[1:] for row in rows if row[0] == split]
        columns = zip(("image", "label", "domain"), zip(*chosen, strict=True), strict=False)
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


def broken(table: datasets.Dataset) -> dict[int, tuple[str, str]]:
    """Return {row: (path, reason)} of all images that cannot be decoded.

    Every image is decoded once; the answer is kept in the cache folder until a file changes.
    """
    names = [str(image["path"] or f"row {row}") for row, image in enumerate(_encoded(table))]
    marks = [_mark(image) for image in _encoded(table)]
    digest = hashlib.sha256(json.dumps([names, marks]).encode()).hexdigest()
    path = cache_folder() / f"decoded-{digest}.json"
    with contextlib.suppress(OSError, ValueError):
        return {
            int(row): (names[int(row)], why) for row, why in json.loads(path.read_text()).items()
        }
    reasons = {row: _reason(image) for row, image in enumerate(_encoded(table))}
    found = {row: why for row, why in reasons.items() if why}
    with contextlib.suppress(OSError):  # then it is decoded again next time
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, json.dumps(found))
    return {row: (names[row], why) for row, why in found.items()}


def _encoded(table: datasets.Dataset) -> Iterator[dict[str, bytes | str | None]]:
    images = table.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
    for batch in images.with_format(None).iter(batch_size=100):
        yield from batch["image"]


def _mark(image: dict[str, bytes | str | None]) -> str:
    """Return what changes when an image does: a hash, or a file's size and time."""
    if isinstance(content := image["bytes"], bytes):
        return hashlib.sha256(content).hexdigest()
    with contextlib.suppress(OSError):
        status = os.stat(str(image["path"]))
        return f"{status.st_size} {status.st_mtime_ns}"
    return "absent"


def _reason(image: dict[str, bytes | str | None]) -> str:
    """Return why an image cannot be decoded, or ""."""
    content = image["bytes"]
    try:
        file = io.BytesIO(content) if isinstance(content, bytes) else str(image["path"])
        with Image.open(file) as picture:
            picture.convert("RGB")
    except Exception as error:  # Pillow's decoders raise anything
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""
