"""From a model's name and its weights' to a checkpoint file, and to the part of a model in it."""

import contextlib
import difflib
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError
from open_clip.factory import load_state_dict
from open_clip.model import convert_to_custom_text_state_dict
from open_clip.pretrained import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME, download_pretrained
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from safetensors import safe_open
from torch import Tensor

from pfedmoap_flwr.assets import asset
from pfedmoap_flwr.errors import UsageError

VISUAL = "visual."
SECONDS = 10.0
"""Until the place of published weights counts as out of reach."""
NO_TOWER = {"image_size": 1, "patch_size": 1, "layers": 0, "width": 1, "head_width": 1}


def find_weights(model: str, pretrained: str) -> str:
    """Return what to give open_clip as `pretrained`: the path of a file, or a published tag.

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


def find_checkpoint(model: str, weights: str) -> Path:
    """Return the file of weights that `find_weights` named; a published one is downloaded once.

    Before it is, the place where it lies is asked once and answers within SECONDS: the clients of
    the hub try for minutes. Raises OSError and the hub client's own errors.
    """
    published = open_clip.get_pretrained_cfg(model, weights)
    if held := held_checkpoint(model, weights):
        return held
    _ask(published)
    return Path(download_pretrained(published))


def get_weights(model: str, pretrained: str) -> Path:
    """Return the checkpoint of a model, downloaded where it is not here.

    Raises UsageError where it is unknown, or cannot be had.
    """
    weights = find_weights(model, pretrained)
    with weights_errors(model, pretrained):
        return find_checkpoint(model, weights)


def _ask(published: dict[str, Any]) -> None:
    """Raise an error where published weights cannot be reached now."""
    place = published.get("hf_hub", "")
    if not place:
        if "url" not in published:  # a file of this machine
            return
        head = urllib.request.Request(published["url"], method="HEAD")
        urllib.request.urlopen(head, timeout=SECONDS).close()
        return
    repository, _, name = place.rpartition("/")
    first, last = _files(name)
    try:
        get_hf_file_metadata(hf_hub_url(repository, first), timeout=SECONDS)
    except EntryNotFoundError:
        get_hf_file_metadata(hf_hub_url(repository, last), timeout=SECONDS)


def _files(name: str) -> tuple[str, str]:
    """Return which files of a repository hold weights: as open_clip does, prefer .safetensors."""
    safe = Path(name).with_suffix(".safetensors").name if name else HF_SAFE_WEIGHTS_NAME
    return safe, name or HF_WEIGHTS_NAME


def held_checkpoint(model: str, weights: str) -> Path | None:
    """Return that file where it is on this machine, or None; nothing is downloaded."""
    published = open_clip.get_pretrained_cfg(model, weights)
    if not published:
        return Path(weights)
    if place := published.get("hf_hub", ""):
        repository, _, name = place.rpartition("/")
        found = [try_to_load_from_cache(repository, each) for each in _files(name)]
        return next((Path(path) for path in found if isinstance(path, str)), None)
    path = Path("~/.cache/clip").expanduser() / Path(published.get("url", "")).name
    return path if path.is_file() else None


def find_preprocessing(model: str, weights: str) -> PreprocessCfg:
    """Return how images are prepared: the size is the model's, the rest belongs to the weights."""
    size = open_clip.get_model_config(model)["vision_cfg"].get("image_size", 224)
    published = open_clip.get_pretrained_cfg(model, weights)
    return PreprocessCfg(**merge_preprocess_dict(PreprocessCfg(), {**published, "size": size}))


def load_full_model(model: str, checkpoint: Path) -> Any:
    """Return open_clip's model on the CPU, frozen."""
    # open_clip draws random weights before it loads the real ones. Without this, whether a model
    # was loaded would change every later draw from the global generator.
    with torch.random.fork_rng(devices=[]):
        network = open_clip.create_model(model, str(checkpoint))
    return network.eval().requires_grad_(False)


def load_text_model(model: str, checkpoint: Path) -> Any:
    """Return open_clip's model on the CPU, frozen, without its image tower.

    Of a .safetensors file only the text tower's part is read.
    """
    try:
        network = _empty_text_model(model)
        network.load_state_dict(_text_weights(checkpoint, custom=hasattr(network, "text")))
        return network.eval().requires_grad_(False)
    except Exception:
        # open_clip's own loader reads more kinds of models and files, and has the better errors
        network = load_full_model(model, checkpoint)
        del network.visual
        return network


def _empty_text_model(model: str) -> Any:
    """Build the model as `open_clip.create_model` does, less its image tower."""
    config = open_clip.get_model_config(model)
    hugging_face = "hf_model_name" in config["text_cfg"]
    if hugging_face:
        config["text_cfg"]["hf_model_pretrained"] = False
    custom = config.pop("custom_text", False) or hugging_face
    kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    network = kind(**{**config, "vision_cfg": NO_TOWER})
    del network.visual
    return network


def _text_weights(checkpoint: Path, custom: bool) -> dict[str, Tensor]:
    if checkpoint.suffix == ".safetensors":
        with safe_open(checkpoint, "pt") as file:
            names = [name for name in file.keys() if not name.startswith(VISUAL)]  # noqa: SIM118
            weights = {name: file.get_tensor(name) for name in names}
    else:
        weights = load_state_dict(str(checkpoint))
        weights = {n: tensor for n, tensor in weights.items() if not n.startswith(VISUAL)}
    return convert_to_custom_text_state_dict(weights) if custom else weights


@contextlib.contextmanager
def weights_errors(model: str, pretrained: str) -> Iterator[None]:
    """Turn any exception while weights are loaded into a UsageError of one line."""
    try:
        yield
    except Exception as error:
        # open_clip, the hub client and the file readers each raise their own kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(
            f"weights '{pretrained}' for {model} could not be loaded ({reason[:200]}); give a "
            "local checkpoint with clip.pretrained=/path/to/file, or use the bundled "
            "clip.model=mini clip.pretrained=mini"
        ) from error
