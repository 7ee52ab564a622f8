"""The data sets, as labelled images in train, validation and test splits."""

import functools
import hashlib
import itertools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq

from pfedmoap_flwr.assets import asset
from pfedmoap_flwr.data import SPLITS
from pfedmoap_flwr.data.catalogue import BUNDLED, FOLDER, Source, find_source
from pfedmoap_flwr.data.holdout import holdout
from pfedmoap_flwr.data.labels import join, listed
from pfedmoap_flwr.data.settings import ImageSettings
from pfedmoap_flwr.data.sources import folder, hub
from pfedmoap_flwr.errors import UsageError

logger = logging.getLogger("flwr.pfedmoap")


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set: columns `image`, `label` and `domain` in each split.

    `classnames` and `domains` are in label order; `template` is the zero-shot sentence;
    `provenance` says for the run folder where the images come from.
    """

    name: str
    classnames: tuple[str, ...]
    domains: tuple[str, ...]
    template: str
    splits: Mapping[str, datasets.Dataset]
    provenance: Mapping[str, Any] = field(default_factory=dict)

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
    if data.classnames and source.name != FOLDER:
        raise UsageError(
            f"setting data.classnames: {source.name} has its own list; it is for data.name=folder"
        )
    if source.name == BUNDLED:
        return _bundled(data)
    if source.name == FOLDER and not data.path:
        raise UsageError("setting data.name='folder': set data.path to your images")
    tables, source, origin = _tables(data, source)
    joined, classnames, domains = join(tables, source, _given(data.classnames))
    if not classnames:
        raise UsageError(
            f"setting data.path={data.path!r}: no images there; images lie as train/CLASS/x.jpg, "
            "and a folder without any needs setting data.classnames"
        )
    skipped = 0
    if source.name == FOLDER or origin == "files":
        joined, skipped = _whole_images(joined, strict=data.strict)
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
        },
    )


_kept = functools.lru_cache(maxsize=2)(load_anew)


def forget_images() -> None:
    """Free the data sets of this process; the next `load_images` reads from disk again."""
    _kept.cache_clear()


def _tables(data: ImageSettings, source: Source) -> tuple[dict[str, datasets.Dataset], Source, str]:
    """Return the tables, the source as they spell it, and where they come from."""
    if not data.path:
        return hub.from_hub(source), source, f"hub: {source.hub}"
    path = Path(data.path).expanduser().resolve()
    if not path.exists():
        raise UsageError(f"setting data.path={data.path!r}: there is nothing at {path}")
    if source.coop and (place := folder.find_coop(path, source.coop)):
        tables = folder.to_tables(folder.read_coop(place, source.coop))
        exact = replace(folder.as_read(source), holdout="published", domain="")
        return tables, exact, f"CoOp's {source.coop.split}"
    if path.is_dir() and source.classnames and folder.has_idx(path):
        return folder.read_idx(path, source.classnames), source, "idx files"
    if path.is_dir() and hub.is_table(path):
        return hub.from_copy(path, source), source, "local copy"
    rows = folder.read_tree(path) if path.is_dir() else folder.read_csv(path)
    if source.domain and source.name != FOLDER and not all(domain for *_, domain in rows):
        raise UsageError(f"setting data.path={data.path!r}: {source.name} needs DOMAIN/CLASS/x.jpg")
    return folder.to_tables(rows), folder.as_read(source), "files"


def _whole_images(
    tables: dict[str, datasets.Dataset], *, strict: bool
) -> tuple[dict[str, datasets.Dataset], int]:
    """Return the tables without the images that cannot be decoded, and how many those were."""
    good, count = {}, 0
    for split, table in tables.items():
        found = folder.broken(table)
        for path, reason in found.values():
            if strict:
                raise UsageError(f"broken image {path}: {reason}; data.strict=false skips it")
            logger.warning("broken image skipped: %s (%s)", path, reason)
        rows = np.setdiff1d(np.arange(len(table)), list(found))
        good[split] = table.select(rows) if found else table
        count += len(found)
    return good, count


def _given(setting_text: str) -> list[str]:
    """Return the agreed class list. Raises UsageError where it is no file and no list."""
    if not setting_text:
        return []
    path = Path(setting_text).expanduser()
    text = path.read_text() if "," not in setting_text and path.is_file() else ""
    if not text and "," not in setting_text:
        raise UsageError(
            f"setting data.classnames={setting_text!r}: no such file, and no names between commas"
        )
    names = text.splitlines() if text else setting_text.split(",")
    names = [name.replace("_", " ").strip() for name in names if name.strip()]
    spelt = [name.casefold() for name in names]
    if twice := [name for name in names if spelt.count(name.casefold()) > 1]:
        raise UsageError(
            f"setting data.classnames names {listed(sorted(set(twice)))} more than once"
        )
    return names


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
