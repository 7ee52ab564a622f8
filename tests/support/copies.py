"""Small local copies of the hub's data sets, in their schema; a pixel tells class and domain."""

import functools
import io
import json
import shutil
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from pfedmoap_flwr.data.catalogue import CATALOGUE, Source

PUBLISHED: dict[str, list[str]] = json.loads((Path(__file__).parent / "hub_names.json").read_text())
DOMAINS = {
    "domainnet": ["clipart", "infograph", "painting", "quickdraw", "real", "sketch"],
    "office-home": ["Art", "Clipart", "Product", "Real World"],
    "pacs": ["art_painting", "cartoon", "photo", "sketch"],
}
ON_HUB = [source for source in CATALOGUE.values() if source.hub]
PER_CLASS = 10


def hub_names(source: Source) -> list[str]:
    """Class names in the hub's spelling and order."""
    return PUBLISHED.get(source.name) or list(source.classnames)


@functools.cache
def png(label: int, domain: int = 0, mode: str = "RGB") -> bytes:
    """An image whose colour is the class's number on the hub and the domain's."""
    colour = (label % 256, label // 256, 50 * domain) if mode == "RGB" else label
    file = io.BytesIO()
    Image.new(mode, (4, 4), colour).save(file, "PNG")
    return file.getvalue()


def read(image: Image.Image) -> tuple[int, int]:
    """The class's number and the domain's that an image shows."""
    red, green, blue = image.convert("RGB").getpixel((0, 0))  # type: ignore[misc]
    if image.mode == "L":
        return red, 0
    return red + 256 * green, blue // 50


def tables(source: Source, per_class: int = PER_CLASS) -> dict[str, datasets.Dataset]:
    """A data set as the hub has it: column names, label order, splits, more classes."""
    names, domains = hub_names(source), DOMAINS.get(source.name, [""])
    mode = "L" if source.name == "fashion-mnist" else "RGB"
    features: dict[str, Any] = {
        source.image: datasets.Image(),
        source.label: datasets.ClassLabel(names=names),
    }
    if source.domain:
        features[source.domain] = datasets.Value("string")
    if source.name == "cifar100":
        features["coarse_label"] = datasets.ClassLabel(names=["some", "others"])
    made = {}
    for split in source.splits:
        rows: dict[str, list[Any]] = {name: [] for name in features}
        for label, name in enumerate(names):
            wanted = not source.subset or source.readable(name) in source.classnames
            for domain, domain_name in enumerate(domains):
                for _ in range(per_class if wanted else 1):
                    image = {"bytes": png(label, domain, mode), "path": None}
                    rows[source.image].append(image)
                    rows[source.label].append(label)
                    if source.domain:
                        rows[source.domain].append(domain_name)
                    if "coarse_label" in rows:
                        rows["coarse_label"].append(label % 2)
        made[split] = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    return made


def write_parquet(folder: Path, made: dict[str, datasets.Dataset]) -> Path:
    """A folder that `datasets.load_dataset` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, table in made.items():
        table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def write_tree(root: Path, counts: dict[str, int], domain: int = 0) -> Path:
    """Images as root/CLASS/n.png, `counts` of each class, shown by its number in `counts`."""
    for label, (name, count) in enumerate(counts.items()):
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            (folder / f"{number}.png").write_bytes(png(label, domain))
    return root


def in_the_cache(tmp_path: Path, repository: str, copy: Path) -> None:
    """Put a copy where `datasets` keeps what it loaded from the hub before."""
    owner, _, name = repository.partition("/")
    name = datasets.naming.camelcase_to_snakecase(name)
    cached = tmp_path / "hf" / f"{owner}___{name}" / "default" / "0.0.0" / ("a1" * 20)
    datasets.load_dataset(str(copy), cache_dir=str(tmp_path / "built"))
    (arrow,) = {path.parent for path in (tmp_path / "built").rglob("*.arrow")}
    cached.parent.mkdir(parents=True)
    shutil.copytree(arrow, cached)
    for file in cached.glob("*.arrow"):
        file.rename(file.with_name(f"{name}-{file.name.split('-')[-1]}"))
