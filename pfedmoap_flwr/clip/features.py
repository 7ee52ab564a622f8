"""Frozen image features: computed once per images, weights and preprocessing, mapped from disk."""

import contextlib
import functools
import hashlib
import json
import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from open_clip.utils import to_2tuple
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from torch import Tensor
from torch.nn import functional as F
from torchvision import transforms

from pfedmoap_flwr.cache import cache_folder, file_of, kept
from pfedmoap_flwr.clip.load import FrozenClip
from pfedmoap_flwr.clip.patches import project_positions
from pfedmoap_flwr.data.images import image_digests
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.randomness import derive_seed

BATCH = 128
RECIPE = 1  # goes up when what is computed below changes
logger = logging.getLogger("flwr.pfedmoap")

Reads = Literal["features", "tokens", "pixels"]


def read_images(
    clip: FrozenClip,
    images: datasets.Dataset,
    reads: Reads,
    views: int = 0,
    dtype: Literal["float32", "float16"] = "float32",
) -> Tensor:
    """Return what a method reads of each image, L2-normalised, as `dtype`, mapped from disk.

    "features": (n, d). "tokens": (n, T, d), every patch in the joint space. With `views` V, of V
    augmentations of each image instead: (n, V, d) or (n, V, T, d), the same ones on every machine.

    The image tower is loaded only where the cache lacks them, and freed again.

    Raises UsageError for "pixels", which no method here reads yet; for an image tower that has no
    patch tokens; for a cache folder that cannot be written.
    """
    if reads not in ("features", "tokens"):
        raise UsageError(
            f"a method reads '{reads}' of an image; only 'features' and 'tokens' can be read so far"
        )
    if not len(images):
        return torch.empty(0)  # of no image there is nothing to read, not even a shape
    pictures = _digest(images)
    step = max(1, BATCH // max(1, views))

    def compute(start: int) -> Generator[np.ndarray, None, None]:
        prepare = _augmenting(clip, views, pictures) if views else _plain(clip)
        for block in _encode(
            clip, images, prepare, reads, range(start, len(images), step), getattr(torch, dtype)
        ):
            yield (block.unflatten(0, (-1, views)) if views else block).numpy()

    return torch.from_numpy(
        kept(_name(clip, images, reads, views, dtype), len(images), step, compute)
    )


def read_splits(
    clip: FrozenClip,
    splits: Mapping[str, datasets.Dataset],
    reads: Reads,
    views: int = 0,
    dtype: Literal["float32", "float16"] = "float32",
) -> dict[str, Tensor]:
    """Return `read_images` of every split."""
    return {
        split: read_images(clip, images, reads, views_of(split, views), dtype)
        for split, images in splits.items()
    }


def feature_files(
    clip: FrozenClip,
    splits: Mapping[str, datasets.Dataset],
    reads: Reads,
    views: int = 0,
    dtype: Literal["float32", "float16"] = "float32",
) -> dict[str, Path]:
    """Return where `read_splits` keeps each split that has images, computed yet or not."""
    return {
        split: file_of(_name(clip, images, reads, views_of(split, views), dtype))
        for split, images in splits.items()
        if len(images)
    }


def views_of(split: str, views: int) -> int:
    """Return how many views a split has: they are of training images alone."""
    return views if split == "train" else 0


def read_shape(clip: FrozenClip, reads: Reads) -> tuple[int, ...]:
    """Return the shape of what is read of one view: (d,), or (T, d) of tokens."""
    with clip.image_tower() as tower:
        pixels = torch.zeros(1, 3, *to_2tuple(clip.preprocessing.size), device=clip.device)
        return tuple(_positions(tower, pixels, reads).shape[1:])


def _name(clip: FrozenClip, images: datasets.Dataset, reads: Reads, views: int, dtype: str) -> str:
    """Return what names the features: a hash of all that decides their bytes."""
    described = {
        "recipe": RECIPE,
        "weights": clip.checkpoint_digest,
        "model": clip.name,
        "config": clip.config,
        "preprocessing": asdict(clip.preprocessing),
        "images": _digest(images),
        "reads": reads,
        "views": views,
        "dtype": dtype,
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


@functools.lru_cache(maxsize=6)  # a table never changes; two data sets of three splits
def _digest(images: datasets.Dataset) -> str:
    """Hash the encoded bytes of all images, in their order."""
    digest = hashlib.sha256()
    for image in image_digests(images):
        digest.update(image)
    return digest.hexdigest()


Prepare = Callable[[int, Any], list[Tensor]]
"""From an image's number and the image to its inputs (3, H, W) of the tower."""


def _plain(clip: FrozenClip) -> Prepare:
    return lambda number, image: [clip.preprocess(image)]


def _augmenting(clip: FrozenClip, views: int, pictures: str) -> Prepare:
    """Return CoOp's augmentation: a random crop, resized, and a flip, before CLIP's own steps."""
    augment = transforms.Compose(
        [
            transforms.RandomResizedCrop(
                to_2tuple(clip.preprocessing.size),
                scale=(0.08, 1.0),
                interpolation=transforms.InterpolationMode.BICUBIC,
            ),
            transforms.RandomHorizontalFlip(),
            clip.preprocess,
        ]
    )

    def view(number: int, image: Any, which: int) -> Tensor:
        # torchvision draws from the global generator only
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed("view", pictures, number, which))
            return augment(image)

    return lambda number, image: [view(number, image, which) for which in range(views)]


def _encode(
    clip: FrozenClip,
    images: datasets.Dataset,
    prepare: Prepare,
    reads: Reads,
    starts: range,
    dtype: torch.dtype,
) -> Iterator[Tensor]:
    """Yield the blocks that begin at `starts`, with the image tower in memory for so long."""
    if not starts:
        return
    began, size = time.monotonic(), 0
    with clip.image_tower() as tower, _progress(clip.name, starts) as advance:
        tower_size = sum(t.nbytes for t in tower.state_dict().values())
        for start in starts:
            batch = images[start : start + starts.step]["image"]
            inputs = [
                pixels
                for number, image in enumerate(batch, start)
                for pixels in prepare(number, image.convert("RGB"))
            ]
            block = _positions(tower, torch.stack(inputs).to(clip.device), reads).to("cpu", dtype)
            size += block.nbytes
            yield block
            advance(len(batch))
    logger.info(
        "read %d images with %s in %.1f s: %.1f MB kept in %s and mapped into memory from there; "
        "the image tower's %.1f MB are free again",
        starts.stop - starts.start,
        clip.name,
        time.monotonic() - began,
        size / 1e6,
        cache_folder(),
        tower_size / 1e6,
    )


@torch.no_grad()
def _positions(tower: Any, pixels: Tensor, reads: Reads) -> Tensor:
    if reads == "tokens":
        found = project_positions(tower, pixels)[:, 1:]
    else:
        found = tower(pixels)
        # CoCa's tower returns its tokens as well
        found = found[0] if isinstance(found, tuple) else found
    return F.normalize(found.float(), dim=-1)


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
