"""Load a frozen CLIP through open_clip: the bundled mini, any published model, or a local file."""

import difflib
import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor
from torch.nn import functional as F

from pfedmoap_flwr.assets import asset
from pfedmoap_flwr.clip.text import Position, PromptEncoder, embed_words, encode_text
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.settings import setting


@dataclass(frozen=True)
class ClipSettings:
    """The frozen model."""

    model: str = setting("mini", "an open_clip model name")
    pretrained: str = setting("mini", "bundled name, published tag, or path of a checkpoint")


@dataclass(frozen=True, eq=False)
class FrozenClip:
    """A CLIP model whose weights never change (open_clip's model, tokenizer and preprocessing)."""

    name: str
    model: Any
    tokenizer: Callable[[list[str]], Tensor]
    preprocess: Callable[[Any], Tensor]
    device: torch.device

    @functools.cached_property
    def logit_scale(self) -> float:
        """The inverse temperature 1/tau of Eq. 4."""
        return float(self.model.logit_scale.exp())

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of all weights, buffers and the preprocessing."""
        digest = hashlib.sha256(repr(self.preprocess).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    @functools.lru_cache(maxsize=8)  # noqa: B019 - a FrozenClip lives as long as its process
    def encoder(
        self, classnames: tuple[str, ...], n_ctx: int, position: Position, class_specific: bool
    ) -> PromptEncoder:
        """Return g(.) for these classes, made once."""
        try:
            return PromptEncoder(
                self.model,
                self.tokenizer,
                classnames,
                n_ctx=n_ctx,
                position=position,
                class_specific=class_specific,
            )
        except ValueError as error:
            raise UsageError(f"clip.model={self.name}: {error}") from error

    def embed(self, words: str) -> Tensor:
        """Return the token embeddings (n, D) of plain words, to start a context from."""
        return embed_words(self.model, self.tokenizer, words)

    @functools.lru_cache(maxsize=8)  # noqa: B019
    def zeroshot(self, classnames: tuple[str, ...], template: str) -> Tensor:
        """Return hand-written prompts' text features (C, d), L2-normalised."""
        with torch.no_grad():
            texts = [template.format(name.replace("_", " ")) for name in classnames]
            return encode_text(self.model, self.tokenizer, texts)

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """Return image features (B, d), L2-normalised, of preprocessed images (B, 3, H, W)."""
        return F.normalize(self.model.encode_image(images.to(self.device)).float(), dim=-1)


def resolve_device(name: str) -> torch.device:
    """Return the device of the `device` setting; "auto" is CUDA where present."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "setting device='cuda': no CUDA device here; use device=auto or device=cpu"
        )
    return torch.device(name)


@functools.lru_cache(maxsize=2)
def load_clip(model: str, pretrained: str, device: str = "auto") -> FrozenClip:
    """Load a model by open_clip's name; `pretrained` is a bundled name, a file, or a published tag.

    Raises UsageError where the model is unknown or its weights cannot be had.
    """
    torch_device = resolve_device(device)
    weights = find_weights(model, pretrained)
    try:
        network, _, preprocess = open_clip.create_model_and_transforms(
            model, pretrained=weights, device=torch_device
        )
    except Exception as error:
        # open_clip, the hub client and the file readers each raise their own kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(
            f"weights '{pretrained}' for {model} could not be loaded ({reason[:200]}); give a "
            "local checkpoint with clip.pretrained=/path/to/file, or use the bundled "
            "clip.model=mini clip.pretrained=mini"
        ) from error
    network.eval().requires_grad_(False)
    return FrozenClip(model, network, open_clip.get_tokenizer(model), preprocess, torch_device)


def find_weights(model: str, pretrained: str) -> str:
    """Return what open_clip takes for `pretrained`: a file, bundled or not, or a published tag.

    Raises UsageError where the model or the weights do not exist, or do not belong together.
    """
    open_clip.add_model_config(asset("clip"))
    if model not in open_clip.list_models():
        near = difflib.get_close_matches(model, open_clip.list_models(), n=1, cutoff=0.0)[0]
        raise UsageError(
            f"setting clip.model={model!r}: unknown to open_clip; did you mean '{near}'?"
        )
    if Path(pretrained).is_file():
        return str(Path(pretrained).resolve())
    if model == pretrained:
        return str(asset(f"clip/{pretrained}.safetensors"))
    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained not in tags:
        offer = f"one of {', '.join(tags)}, or " if tags else ""
        raise UsageError(
            f"setting clip.pretrained={pretrained!r}: no such file and not published for {model}; "
            f"use {offer}the path of a checkpoint file"
        )
    published = open_clip.get_pretrained_cfg(model, pretrained)
    quick_gelu = bool((open_clip.get_model_config(model) or {}).get("quick_gelu", False))
    twin = model.removesuffix("-quickgelu") + ("" if quick_gelu else "-quickgelu")
    if bool(published.get("quick_gelu", False)) != quick_gelu:
        raise UsageError(
            f"clip.model={model} and clip.pretrained={pretrained} disagree on QuickGELU; "
            f"use clip.model={twin}"
        )
    return pretrained
