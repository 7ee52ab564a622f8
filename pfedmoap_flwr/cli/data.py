"""pfedmoap data: which data sets there are, who would hold what, and everything made ready."""

import json
import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from pfedmoap_flwr import config, logs, methods
from pfedmoap_flwr.cache import cache_folder
from pfedmoap_flwr.cli.say import say
from pfedmoap_flwr.clip.features import feature_files, read_splits
from pfedmoap_flwr.clip.load import load_clip
from pfedmoap_flwr.config import Settings
from pfedmoap_flwr.data import SPLITS
from pfedmoap_flwr.data.catalogue import BUNDLED, CATALOGUE, FOLDER, Source
from pfedmoap_flwr.data.federated import federated
from pfedmoap_flwr.data.images import ImageData, duplicates, load_images
from pfedmoap_flwr.data.partition import class_counts, manifest
from pfedmoap_flwr.data.sources.hub import is_cached
from pfedmoap_flwr.report import data_tables, figures
from pfedmoap_flwr.report.tables import megabytes
from pfedmoap_flwr.settings import Value


def print_sets(console: Console) -> None:
    """Print every data set that has a name, and which are on this machine; no network is used."""
    data_tables.print_catalogue(
        [data_tables.Entry(s, *_extent(s), place(s)) for s in CATALOGUE.values()], console
    )


def place(source: Source) -> str:
    """Say where a data set is, as far as this machine knows without asking the hub."""
    if source.name == BUNDLED:
        return "bundled"
    if source.name == FOLDER:
        return "data.path"
    return "hub cache" if is_cached(source) else "not here"


def is_here(source: Source) -> bool:
    """Tell whether a data set loads by its name alone, without network."""
    return source.name == BUNDLED or is_cached(source)


def _extent(source: Source) -> tuple[int, int, int]:
    """Return how many classes, domains and images there are, 0 where that is not known."""
    if source.name == BUNDLED:
        images = load_images(BUNDLED)
        return len(images.classnames), len(images.domains), sum(map(len, images.splits.values()))
    return len(source.classnames), source.num_domains * (source.name != FOLDER), source.size


def print_partition(
    values: Mapping[str, Value], figure: Path | None, *, as_json: bool, console: Console
) -> None:
    """Print who holds which images under the settings; nothing is computed of an image."""
    settings = config.parse(values)
    if figure:
        figures.check_target(figure)
    held = federated(settings.data, settings.seed)
    images, clients = held.images, list(held.clients.values())
    said = manifest(images, settings.data, settings.seed, clients)
    if figure:
        counts = class_counts(images, clients, "train")
        names = [f"{c.client_id} {c.domain}".rstrip() for c in clients]
        figures.draw_partition(counts, images.classnames, names, title(settings), figure)
    if as_json:
        console.out(json.dumps(said), highlight=False)
        return
    _print_origin(images, console)
    data_tables.print_partition(images, clients, title(settings), console)
    twice = duplicates(images)
    for (split, other), count in twice.items():
        say(console, f"images of {other} that are in {split} too: {count}")
    if not twice:
        say(console, "no image is in two splits")
    say(console, f"sha256 of the partition: {said['sha256']}")
    if figure:
        say(console, f"figure in {figure}")


def title(settings: Settings) -> str:
    """Return a partition in words."""
    data = settings.data
    return f"{data.name}, {data.partition}, {data.num_clients} clients, seed {settings.seed}"


def prepare_features(values: Mapping[str, Value], console: Console) -> None:
    """Get a data set and weights, check them, and compute all image features a run will read.

    Stopped, it goes on after the last images that were kept.
    """
    settings = config.parse(values)
    logs.set_up(settings.log_format)
    images = load_images(settings.data)
    _print_origin(images, console)
    clip = load_clip(settings.clip, settings.device)
    size = megabytes(clip.checkpoint.stat().st_size)
    say(console, f"weights: {clip.checkpoint}, {size}")
    reading = methods.load(settings.method).reads(settings.own)
    dtype = settings.clip.features_dtype
    files = feature_files(clip, images.splits, reading, dtype, images.window)
    there = {split for split, file in files.items() if file.exists()}
    began = time.monotonic()
    read_splits(clip, images.splits, reading, dtype, images.window)
    for split, file in files.items():
        how = "was there" if split in there else "computed"
        kept = megabytes(file.stat().st_size)
        say(console, f"features of {split}: {len(images.splits[split])} images, {kept}, {how}")
    total = megabytes(sum(file.stat().st_size for file in files.values()))
    if there == set(files):
        say(console, f"all is there: {total} in {cache_folder()}")
    else:
        say(console, f"{total} in {cache_folder()}, {time.monotonic() - began:.1f} s")


def _print_origin(images: ImageData, console: Console) -> None:
    said = {key: value for key, value in images.provenance.items() if key != "sizes" and value}
    say(console, ", ".join(f"{key}: {value}" for key, value in said.items()))
    sizes = ", ".join(f"{len(images.splits[split])} {split}" for split in SPLITS)
    domains = f", {len(images.domains)} domains" if len(images.domains) > 1 else ""
    say(console, f"images: {sizes}; {len(images.classnames)} classes{domains}")
