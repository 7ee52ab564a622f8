"""Small models of every kind that open_clip builds, with random weights."""

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file

VIT = {"image_size": 16, "layers": 1, "width": 64, "head_width": 32, "patch_size": 8}
RN = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 1}
MADE: dict[str, dict[str, Any]] = {
    "vit": {"embed_dim": 64, "vision_cfg": VIT, "text_cfg": TEXT},
    "vit-quickgelu": {"embed_dim": 64, "quick_gelu": True, "vision_cfg": VIT, "text_cfg": TEXT},
    "vit-custom": {"embed_dim": 64, "custom_text": True, "vision_cfg": VIT, "text_cfg": TEXT},
    "rn": {"embed_dim": 64, "vision_cfg": RN, "text_cfg": TEXT},
    "rn-custom": {"embed_dim": 64, "custom_text": True, "vision_cfg": RN, "text_cfg": TEXT},
    "coca": {
        "embed_dim": 32,
        "custom_text": True,
        "vision_cfg": {**VIT, "attentional_pool": True, "output_tokens": True},
        "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {"width": 32, "context_length": 16, "heads": 4, "layers": 1},
    },
}


def make(name: str, folder: Path) -> tuple[Any, Path]:
    """open_clip's whole model with random weights, and the checkpoint that it was read from."""
    (folder / f"made-{name}.json").write_text(json.dumps(MADE[name]))
    open_clip.add_model_config(folder / f"made-{name}.json")
    torch.manual_seed(0)
    path = folder / f"{name}.safetensors"
    random = open_clip.create_model(f"made-{name}").state_dict()
    save_file({key: tensor.contiguous() for key, tensor in random.items()}, path)
    return whole(f"made-{name}", path), path


def whole(name: str, path: Path) -> Any:
    """open_clip's model, frozen: for weights that want gradients PyTorch rounds otherwise."""
    return open_clip.create_model(name, str(path)).eval().requires_grad_(False)
