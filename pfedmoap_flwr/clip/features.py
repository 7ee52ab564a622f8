"""Frozen image features, computed once per images, weights and preprocessing, and kept on disk."""

import hashlib
import logging
import os
import tempfile
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from pfedmoap_flwr.clip.load import FrozenClip
from pfedmoap_flwr.errors import UsageError

BATCH = 128
logger = logging.getLogger("flwr.pfedmoap")


def cache_folder() -> Path:
    """Return the folder of computed features: $PFEDMOAP_CACHE or ~/.cache/pfedmoap."""
    return Path(os.environ.get("PFEDMOAP_CACHE", "~/.cache/pfedmoap")).expanduser()


def read_images(
    clip: FrozenClip, images: datasets.Dataset, reads: Literal["features", "tokens", "pixels"]
) -> Tensor:
    """Return what a method reads of each image; "features": (n, d) float32, L2-normalised.

    Raises UsageError for "tokens" and "pixels", which no method here reads yet.
    """
    if reads != "features":
        raise UsageError(
            f"a method reads '{reads}' of an image; only 'features' can be read so far"
        )
    path = cache_folder() / f"{_key(clip, images)}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    # One process computes, the others wait for its file
    with FileLock(f"{path}.lock"):
        features = _load(path, len(images))
        if features is None:
            features = _compute(clip, images)
            _save(path, features)
    return torch.from_numpy(features)


def _key(clip: FrozenClip, images: datasets.Dataset) -> str:
    digest = hashlib.sha256(clip.fingerprint.encode())
    for image in _encoded(images):
        digest.update(image["bytes"] or Path(image["path"]).read_bytes())
    return digest.hexdigest()


def _encoded(images: datasets.Dataset) -> list[dict[str, Any]]:
    column: list[dict[str, Any]] = images.cast_column(
        "image", datasets.Image(decode=False)
    ).with_format(None)["image"][:]
    return column


def _load(path: Path, length: int) -> np.ndarray | None:
    try:
        features: np.ndarray = np.load(path)
    except (FileNotFoundError, ValueError, EOFError, OSError):
        return None
    return features if len(features) == length and np.isfinite(features).all() else None


def _compute(clip: FrozenClip, images: datasets.Dataset) -> np.ndarray:
    logger.info("computing features of %d images with %s", len(images), clip.name)
    parts = []
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH]["image"]
        pixels = torch.stack([clip.preprocess(image.convert("RGB")) for image in batch])
        parts.append(clip.encode_image(pixels).cpu())
    return torch.cat(parts).numpy()


def _save(path: Path, features: np.ndarray) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        np.save(file, features)
    os.replace(file.name, path)
