"""A tiny random CLIP and a tiny two-domain data set, found the way the embedded ones are."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file

from pfedmoap_flwr.clip.load import FrozenClip, load_clip
from pfedmoap_flwr.clip.settings import ClipSettings

CLASSNAMES = ["red panda", "blue whale", "green tree frog", "snow_owl"]
DOMAINS = ["photo", "sketch"]
NUM_CLIENTS = 4
TINY_CLIP = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2},
}
TINY: dict[str, Any] = {
    "clip.model": "tiny",
    "clip.pretrained": "tiny",
    "data.num-clients": NUM_CLIENTS,
    "data.alpha": 5.0,
    "prompt.n-ctx": 4,
    "num-server-rounds": 2,
    "local-epochs": 2,
    "batch-size": 8,
    "pfedmoap.d-gating": 32,
    "pfedmoap.heads": 4,
    "pfedmoap.num-experts": 2,
    "device": "cpu",
    "clients-at-once": 1,
    "eval.below-chance": "go-on",  # its weights are random
}
PER_CLASS = {"train": 12, "validation": 4, "test": 8}


def write_clip(folder: Path) -> None:
    """A model that open_clip and the package know as "tiny"."""
    folder.mkdir()
    (folder / "tiny.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    model = open_clip.create_model("tiny")
    # A random vision tower tells images apart better with larger weights; a text tower like that
    # would turn rounding errors of the context into other features
    large = "visual.transformer.resblocks"
    weights = {n: t * (3 if large in n else 1) for n, t in model.state_dict().items()}
    save_file({n: t.contiguous() for n, t in weights.items()}, folder / "tiny.safetensors")


def write_images(folder: Path) -> None:
    """One colour per class, darker in the second domain, with noise."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    colours = np.array([[220, 40, 40], [40, 40, 220], [40, 200, 40], [230, 230, 230]])
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=CLASSNAMES),
            "domain": datasets.ClassLabel(names=DOMAINS),
        }
    )
    for split, count in PER_CLASS.items():
        rows: dict[str, list[Any]] = {"image": [], "label": [], "domain": []}
        for domain in range(len(DOMAINS)):
            for label in range(len(CLASSNAMES)):
                for _ in range(count):
                    noise = rng.normal(0, 30, (16, 16, 3))
                    pixels = np.clip(colours[label] * (1 - 0.5 * domain) + noise, 0, 255)
                    rows["image"].append(Image.fromarray(pixels.astype(np.uint8)))
                    rows["label"].append(label)
                    rows["domain"].append(domain)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")


def frozen_clip(model: str = "tiny", pretrained: str | Path = "", **changes: Any) -> FrozenClip:
    """Load a model on the CPU; its weights have its own name, unless a file is given."""
    settings = ClipSettings(model=model, pretrained=str(pretrained or model), **changes)
    return load_clip(settings, "cpu")
