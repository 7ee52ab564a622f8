"""The data sets, as labelled images in train, validation and test splits."""

import functools
import hashlib
import importlib.util
import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq

from pfedmoap_flwr.assets import asset
from pfedmoap_flwr.data import SPLITS
from pfedmoap_flwr.data.catalogue import BUNDLED, FOLDER, HUB, Source, find_source
from pfedmoap_flwr.data.groups import GROUP, check_whole, found_in_paths
from pfedmoap_flwr.data.holdout import holdout
from pfedmoap_flwr.data.labels import choose_columns, join, listed
from pfedmoap_flwr.data.pixels import Window, read_window
from pfedmoap_flwr.data.settings import ImageSettings
from pfedmoap_flwr.data.sources import folder, hub
from pfedmoap_flwr.data.sources.scan import scan
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.settings import path_of, shown

logger = logging.getLogger("flwr.pfedmoap")


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set: columns `image`, `label` and `domain` in each split.

    `classnames` and `domains` are in label order; `template` is the zero-shot sentence;
    `provenance` says for the run folder where the images come from; `window` is of pixels of more
    than 8 bits.
    """

    name: str
    classnames: tuple[str, ...]
    domains: tuple[str, ...]
    template: str
    splits: Mapping[str, datasets.Dataset]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    window: Window | None = None

    @functools.lru_cache(maxsize=16)  # noqa: B019 - a data set lives as long as its process
    def column(self, split: str, name: str) -> np.ndarray:
        """Return an integer column (n,) of a split."""
        return np.asarray(self.splits[split].with_format("numpy")[name][:], dtype=np.int64)


def load_images(data: ImageSettings | str) -> ImageData:
    """Load a data set by its settings, or by its name alone.

    Raises UsageError where it is unknown, not to be had, or not what it should be.
    """
    if isinstance(data, str):
        data = ImageSettings(name=data)
    # Without a subclass's other fields: settings that differ in them alone share their images
    return _kept(
        ImageSettings(**{name: getattr(data, name) for name in ImageSettings.model_fields})
    )


def load_anew(data: ImageSettings) -> ImageData:
    """Load a data set as `load_images` does, even where this process holds it already."""
    source = find_source(data.name)
    if data.classnames and not source.is_open:
        raise UsageError(
            f"setting data.classnames: {source.name} has its own list; it is for data.name=folder"
        )
    if (data.image_column or data.label_column) and not source.name.startswith(HUB):
        key = "image-column" if data.image_column else "label-column"
        raise UsageError(f"setting data.{key}: is for data.name=hub:ORG/NAME, not {source.name}")
    if source.name == BUNDLED:
        return _bundled(data)
    if source.name == FOLDER and not data.path:
        raise UsageError("setting data.name='folder': set data.path to your images")
    tables, source, origin = _tables(data, source)
    tables = _with_groups(tables, data)
    joined, classnames, domains = join(tables, source, _given(data.classnames))
    if not classnames:
        raise UsageError(
            f"setting data.path={data.path!r}: no images there; images lie as train/CLASS/x.jpg, "
            "and a folder without any needs setting data.classnames"
        )
    skipped, remarks = 0, ""
    if source.name == FOLDER or origin == "files":
        joined, skipped, remarks = _whole_images(joined, data)
    splits, how = holdout(joined, source, data.validation)
    return ImageData(
        name=source.name,
        classnames=classnames,
        domains=domains,
        template=source.template,
        splits=splits,
        provenance={
            "name": source.name,
            "source": origin,
            "revision": hub.revision(tables),
            "licence": source.licence,
            "splits": how,
            "sizes": {split: len(table) for split, table in splits.items()},
            "broken": skipped,
            **({"pixels": remarks} if remarks else {}),
        },
        window=read_window(data.window),
    )


_kept = functools.lru_cache(maxsize=2)(load_anew)


def forget_images() -> None:
    """Free the data sets of this process; the next `load_images` reads from disk again."""
    _kept.cache_clear()


def _tables(data: ImageSettings, source: Source) -> tuple[dict[str, datasets.Dataset], Source, str]:
    """Return the tables, the source as they spell it, and where they come from."""
    if not data.path:
        tables = hub.from_hub(source)
        return tables, _with_columns(tables, data, source), f"hub: {source.hub}"
    path = path_of("data.path", data.path)
    if not path.exists():
        raise UsageError(f"setting data.path={data.path!r}: there is nothing at {path}")
    if not path.is_dir() and not path.is_file():
        raise UsageError(f"setting data.path={data.path!r}: neither a folder nor a regular file")
    if source.coop and (place := folder.find_coop(path, source.coop)):
        tables = folder.to_tables(folder.read_coop(place, source.coop))
        exact = replace(folder.as_read(source), holdout="published", domain="")
        return tables, exact, f"CoOp's {source.coop.split}"
    if path.is_dir() and source.classnames and folder.has_idx(path):
        return folder.read_idx(path, source.classnames), source, "idx files"
    if path.is_dir() and hub.is_table(path):
        tables = hub.from_copy(path, source)
        return tables, _with_columns(tables, data, source), "local copy"
    rows, groups = _listed_images(path, data)
    if source.domain and source.name != FOLDER and not all(domain for *_, domain in rows):
        raise UsageError(f"setting data.path={data.path!r}: {source.name} needs DOMAIN/CLASS/x.jpg")
    return folder.to_tables(rows, groups), folder.as_read(source), "files"


def _listed_images(path: Path, data: ImageSettings) -> tuple[list[folder.Row], list[str]]:
    """Return the images of a tree or a CSV, and their groups, none where no setting asks for any.

    Raises UsageError where DICOM files are among them and cannot be read.
    """
    groups: list[str] = []
    if path.is_dir():
        rows = folder.read_tree(path)
        if data.group_column:
            raise UsageError(
                f"setting data.group-column={data.group_column!r}: a folder has no columns; "
                "list its images in a CSV, or set data.group-pattern"
            )
    else:
        rows, columns = folder.read_csv(path, data.group_column)
        groups = columns if data.group_column else []
    if data.group_pattern:
        if groups:
            raise UsageError("settings data.group-column and data.group-pattern: leave one out")
        root = path if path.is_dir() else path.parent
        groups = found_in_paths([image for _, image, *_ in rows], str(root), data.group_pattern)
    medical = next((image for _, image, *_ in rows if image.lower().endswith(folder.DICOM)), "")
    if medical and importlib.util.find_spec("pydicom") is None:
        raise UsageError(
            f"{medical}: DICOM files need pydicom: pip install 'pfedmoap-flwr[medical]'"
        )
    return rows, groups


def _with_groups(
    tables: dict[str, datasets.Dataset], data: ImageSettings
) -> dict[str, datasets.Dataset]:
    """Return the tables with a column GROUP where a setting asks for groups.

    Raises UsageError where there are none, or the splits as found divide one.
    """
    if not data.group_column and not data.group_pattern:
        return tables
    for split, table in tables.items():
        if GROUP in table.column_names:
            continue
        if data.group_column not in table.column_names:
            what = f"data.group-column={data.group_column!r}" if data.group_column else ""
            raise UsageError(
                f"setting {what or f'data.group-pattern={data.group_pattern!r}'}: {split} has no "
                f"such column; it has {', '.join(table.column_names)}"
            )
        values = list(map(str, table.with_format(None)[data.group_column][:]))
        tables = {**tables, split: table.add_column(GROUP, values)}
    check_whole(tables)
    return tables


def _with_columns(
    tables: dict[str, datasets.Dataset], data: ImageSettings, source: Source
) -> Source:
    """Return a source whose columns are known; those of hub:ORG/NAME are found, or given."""
    if not source.name.startswith(HUB):
        return source
    return choose_columns(tables, source, data.image_column, data.label_column)


def _whole_images(
    tables: dict[str, datasets.Dataset], data: ImageSettings
) -> tuple[dict[str, datasets.Dataset], int, str]:
    """Return the tables without the images that cannot be decoded, and how many those were.

    Last comes a remark on how the others are read, which is logged too, or "".
    """
    good, scans = {}, []
    for split, table in tables.items():
        scans.append(found := scan(table))
        for path, reason in found.broken.values():
            if data.strict:
                raise UsageError(f"broken image {path}: {reason}; data.strict=false skips it")
            logger.warning("broken image skipped: %s (%s)", path, reason)
        rows = np.setdiff1d(np.arange(len(table)), list(found.broken))
        good[split] = table.select(rows) if found.broken else table
    remarks = []
    if deep := sum(found.deep for found in scans):
        scale = (
            f"as data.window={data.window} says" if data.window else "by its own window or range"
        )
        remarks.append(f"{deep} of more than 8 bits, each scaled {scale}")
    if several := sum(found.several for found in scans):
        remarks.append(f"{several} of several frames, of which the first is read")
    if remarks:
        logger.warning("images: %s", "; ".join(remarks))
    return good, sum(len(found.broken) for found in scans), "; ".join(remarks)


def _given(setting_text: str) -> list[str]:
    """Return the agreed class list. Raises UsageError where it is no file and no list."""
    if not setting_text:
        return []
    what = f"setting data.classnames={shown(setting_text)}"
    lines = setting_text.split(",") if "," in setting_text else _lines(setting_text, what)
    names = [name.replace("_", " ").strip() for name in lines]
    names = [name for name in names if name]
    if not names:
        raise UsageError(f"{what}: names no class; leave it out to take those of the images")
    spelt = Counter(name.casefold() for name in names)
    if twice := [name for name in names if spelt[name.casefold()] > 1]:
        raise UsageError(
            f"setting data.classnames names {listed(sorted(set(twice)))} more than once"
        )
    return names


def _lines(setting_text: str, what: str) -> list[str]:
    path = path_of("data.classnames", setting_text)
    if not path.is_file():
        raise UsageError(f"{what}: no such file, and no names between commas")
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UsageError(f"{what}: cannot be read as UTF-8 text ({error})") from error


def _bundled(data: ImageSettings) -> ImageData:
    if data.path:
        raise UsageError(f"setting data.path={data.path!r}: {data.name} is part of the package")
    # Read straight from Parquet: no cache folder, no lock, no temporary copy
    splits = {
        split: datasets.Dataset(pq.read_table(asset(f"{data.name}/{split}.parquet")))
        for split in SPLITS
    }
    features = splits["train"].features
    source = find_source(data.name)
    return ImageData(
        name=data.name,
        classnames=tuple(features["label"].names),
        domains=tuple(features["domain"].names),
        template=source.template,
        splits=splits,
        provenance={
            "name": data.name,
            "source": "bundled",
            "licence": source.licence,
            "splits": "as bundled",
            "sizes": {split: len(table) for split, table in splits.items()},
        },
    )


def image_digests(images: datasets.Dataset) -> Iterator[bytes]:
    """Yield the SHA-256 of each image's encoded bytes, in their order; nothing is decoded."""
    encoded = images.cast_column("image", datasets.Image(decode=False)).with_format(None)
    for batch in encoded.iter(batch_size=1000):
        for image in batch["image"]:
            content = image["bytes"] or Path(image["path"]).read_bytes()
            yield hashlib.sha256(content).digest()


def duplicates(images: ImageData) -> dict[tuple[str, str], int]:
    """Return {(split, other): how many images of `other` are in `split` too}, where there are any.

    Two images are one where their encoded bytes are; the same picture encoded twice is not seen.
    """
    digests = {split: list(image_digests(images.splits[split])) for split in SPLITS}
    found = {
        (split, other): sum(digest in seen for digest in digests[other])
        for split, other in itertools.combinations(SPLITS, 2)
        for seen in [set(digests[split])]
    }
    return {pair: count for pair, count in found.items() if count}
