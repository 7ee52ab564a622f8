"""From an image to the inputs of the image tower: as it is, or as random views of it."""

from collections.abc import Callable
from typing import Any

import torch
from open_clip.utils import to_2tuple
from torch import Tensor
from torchvision import transforms

from pfedmoap_flwr.clip.load import FrozenClip
from pfedmoap_flwr.randomness import derive_seed

Prepare = Callable[[int, Any], list[Tensor]]
"""From an image's number and the image to its inputs (3, H, W) of the tower."""


def plain(clip: FrozenClip) -> Prepare:
    """Return CLIP's own steps, which give one input."""
    return lambda number, image: [clip.preprocess(image)]


def augmented(clip: FrozenClip, views: int, images: str) -> Prepare:
    """Return CoOp's augmentation: a random crop, resized, and a flip, before CLIP's own steps.

    A view is a function of `images` (what names the whole split), the image's number and the
    view's, so that it does not depend on how many views there are.
    """
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
            torch.default_generator.manual_seed(derive_seed("view", images, number, which))
            return augment(image)

    return lambda number, image: [view(number, image, which) for which in range(views)]
