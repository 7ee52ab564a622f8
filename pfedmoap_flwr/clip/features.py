"""Frozen image features: computed once per images, weights and preprocessing, mapped from disk."""

import contextlib
import functools
import hashlib
import json
import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import datasets
import numpy as np
import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from torch import Tensor

from pfedmoap_flwr.cache import cache_folder, file_of, kept
from pfedmoap_flwr.clip.load import FrozenClip
from pfedmoap_flwr.clip.patches import project_positions
from pfedmoap_flwr.clip.tower import encode_image
from pfedmoap_flwr.clip.views import Prepare, augmented, plain
from pfedmoap_flwr.data.images import image_digests
from pfedmoap_flwr.data.pixels import Window, as_rgb

BATCH = 128
RECIPE = 4  # goes up when what is computed below changes
logger = logging.getLogger("flwr.pfedmoap")

Kind = Literal["features", "tokens", "pixels"]
Dtype = Literal["float32", "float16"]


@dataclass(frozen=True)
class Reading:
    """What a method reads of an image, nothing of it normalised.

    "features": the image's own feature (d,). "tokens": (1 + T, d), the image's own feature and
    then each of T patches in the joint space. "pixels": (3, H, W), the input of the image tower.
    With `views` V, V augmentations of each training image instead: (V, ...).
    """

    kind: Kind = "features"
    views: int = 0

    def of(self, split: str) -> "Reading":
        """Return how a split is read: views are of training images alone."""
        return self if split == "train" else Reading(self.kind)


def read_images(
    clip: FrozenClip,
    images: datasets.Dataset,
    reading: Reading,
    dtype: Dtype = "float32",
    window: Window | None = None,
) -> Tensor:
    """Return what is read of each image, (n, ...) by the shape of `reading`, mapped from disk.

    Features are as the image tower gives them, not normalised. Views are the same on every
    machine. The image tower is loaded only where the cache lacks them, and freed again; pixels
    need none. window: of pixels of more than 8 bits.

    Raises UsageError for an image tower that has no patch tokens; for a cache folder that cannot be
    written.
    """
    if not len(images):
        return torch.empty(0)  # without an image the shape is not known
    views = reading.views
    step = max(1, BATCH // max(1, views))

    def compute(start: int) -> Generator[np.ndarray, None, None]:
        prepare = augmented(clip, views, _digest(images)) if views else plain(clip)
        starts = range(start, len(images), step)
        blocks = _blocks(clip, images, prepare, reading.kind, starts, getattr(torch, dtype), window)
        for block in blocks:
            yield (block.unflatten(0, (-1, views)) if views else block).numpy()

    name = _name(clip, images, reading, dtype, window)
    return torch.from_numpy(kept(name, len(images), step, compute))


def read_once(
    clip: FrozenClip,
    images: datasets.Dataset,
    kind: Kind,
    dtype: Dtype,
    window: Window | None = None,
) -> Tensor:
    """Return what is read of images, (n, ...), float32 and on the device; nothing is kept on disk.

    Rounded to `dtype` as what is kept is. window: of pixels of more than 8 bits.

    Raises UsageError as `read_images` does.
    """
    prepare, count = plain(clip), len(images)
    blocks = [range(start, min(start + BATCH, count)) for start in range(0, count, BATCH)]
    rounded = getattr(torch, dtype)
    with _reader(clip, kind) as (read, _):
        inputs = (_inputs(images, prepare, rows, window) for rows in blocks)
        found = [read(pixels).to("cpu", rounded) for pixels in inputs]
    return torch.cat(found).to(clip.device, torch.float32)


def read_splits(
    clip: FrozenClip,
    splits: Mapping[str, datasets.Dataset],
    reading: Reading,
    dtype: Dtype = "float32",
    window: Window | None = None,
) -> dict[str, Tensor]:
    """Return `read_images` of every split."""
    return {
        split: read_images(clip, images, reading.of(split), dtype, window)
        for split, images in splits.items()
    }


def feature_files(
    clip: FrozenClip,
    splits: Mapping[str, datasets.Dataset],
    reading: Reading,
    dtype: Dtype = "float32",
    window: Window | None = None,
) -> dict[str, Path]:
    """Return where `read_splits` keeps each split that has images, computed yet or not."""
    return {
        split: file_of(_name(clip, images, reading.of(split), dtype, window))
        for split, images in splits.items()
        if len(images)
    }


def read_shape(clip: FrozenClip, reading: Reading) -> tuple[int, ...]:
    """Return the shape of what is read of one image: (d,), (1 + T, d) or (3, H, W).

    With views, (V, ...). Raises UsageError as `read_images` does.
    """
    shape = tuple(read_blank(clip, reading.kind).shape)
    return (reading.views, *shape) if reading.views else shape


@functools.lru_cache(maxsize=4)
def read_blank(clip: FrozenClip, kind: Kind) -> Tensor:
    """Return what is read of an image without content, computed once: (d,), (1 + T, d), (3, H, W).

    It is uniformly of the colour that preprocessing subtracts as the mean, so the tower's input is
    0 everywhere. Raises UsageError as `read_images` does.
    """
    pixels = torch.zeros(1, 3, *clip.image_size, device=clip.device)
    with _reader(clip, kind) as (read, _):
        return read(pixels)[0]


def _name(
    clip: FrozenClip,
    images: datasets.Dataset,
    reading: Reading,
    dtype: str,
    window: Window | None,
) -> str:
    """Return the cache key of features: a hash of all that decides their bytes."""
    described = {
        "recipe": RECIPE,
        "weights": clip.checkpoint_digest,
        "model": clip.name,
        "config": clip.config,
        "preprocessing": asdict(clip.preprocessing),
        "images": _digest(images),
        "reading": asdict(reading),
        "dtype": dtype,
        "window": window,
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


@functools.lru_cache(maxsize=6)  # a table never changes; two data sets of three splits
def _digest(images: datasets.Dataset) -> str:
    """Hash the encoded bytes of all images, in their order."""
    digest = hashlib.sha256()
    for image in image_digests(images):
        digest.update(image)
    return digest.hexdigest()


def _blocks(
    clip: FrozenClip,
    images: datasets.Dataset,
    prepare: Prepare,
    kind: Kind,
    starts: range,
    dtype: torch.dtype,
    window: Window | None,
) -> Iterator[Tensor]:
    """Yield the blocks that begin at `starts`, with the image tower in memory for so long."""
    if not starts:
        return
    began, size = time.monotonic(), 0
    with _reader(clip, kind) as (read, tower_size), _progress(clip.name, starts) as advance:
        for start in starts:
            rows = range(start, min(start + starts.step, starts.stop))
            block = read(_inputs(images, prepare, rows, window)).to("cpu", dtype)
            size += block.nbytes
            yield block
            advance(len(rows))
    logger.info(
        "read %d images with %s in %.1f s: %.1f MB kept in %s and mapped into memory from there%s",
        starts.stop - starts.start,
        clip.name,
        time.monotonic() - began,
        size / 1e6,
        cache_folder(),
        f"; the image tower's {tower_size / 1e6:.1f} MB are free again" if tower_size else "",
    )


def _inputs(
    images: datasets.Dataset, prepare: Prepare, rows: range, window: Window | None
) -> Tensor:
    """Return the tower's inputs (len(rows) * V, 3, H, W) of some images."""
    inputs = [
        pixels
        for number in rows
        # One by one: together, large images would take gigabytes before they are prepared
        for pixels in prepare(number, as_rgb(images[number]["image"], window))
    ]
    return torch.stack(inputs)


@contextlib.contextmanager
def _reader(clip: FrozenClip, kind: Kind) -> Iterator[tuple[Callable[[Tensor], Tensor], int]]:
    """Yield what reads pixels (B, 3, H, W), and the bytes of the image tower it keeps in memory."""
    if kind == "pixels":
        yield lambda pixels: pixels, 0
        return
    encode = project_positions if kind == "tokens" else encode_image
    with clip.image_tower() as tower:

        @torch.no_grad()
        def read(pixels: Tensor) -> Tensor:
            return encode(tower, pixels.to(clip.device)).float()

        yield read, sum(tensor.nbytes for tensor in tower.state_dict().values())


@contextlib.contextmanager
def _progress(model: str, starts: range) -> Iterator[Callable[[int], None]]:
    """Show a bar on a terminal, and one line in a log."""
    console = Console(stderr=True)
    if not console.is_terminal:
        logger.info("reading images %d to %d with %s", starts.start, starts.stop, model)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"images with {model}", total=starts.stop, completed=starts.start)
        yield lambda number: bar.advance(task, number)
