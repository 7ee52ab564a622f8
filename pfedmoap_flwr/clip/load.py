"""Load a frozen CLIP through open_clip: the bundled mini, any published model, or a local file."""

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.utils import to_2tuple
from torch import Tensor

from pfedmoap_flwr.clip.blocks import first_blocks
from pfedmoap_flwr.clip.names import Names, NamesEncoder
from pfedmoap_flwr.clip.settings import ClipSettings
from pfedmoap_flwr.clip.template import Template
from pfedmoap_flwr.clip.text import PromptEncoder
from pfedmoap_flwr.clip.tower import ImageTower
from pfedmoap_flwr.clip.weights import (
    find_checkpoint,
    find_preprocessing,
    find_weights,
    load_full_model,
    load_text_model,
    weights_errors,
)
from pfedmoap_flwr.clip.words import Tokenizer, embed_words, encode_text
from pfedmoap_flwr.errors import UsageError


@dataclass(frozen=True, eq=False)
class FrozenClip:
    """A CLIP model whose weights never change: open_clip's, without its image tower.

    Every image is read once (see `features`). The tower is loaded for that, and for methods that
    train through it.
    """

    name: str
    model: Any
    tokenizer: Tokenizer
    preprocessing: PreprocessCfg
    device: torch.device
    checkpoint: Path
    precision: torch.dtype = torch.float32

    @functools.cached_property
    def logit_scale(self) -> float:
        """The inverse temperature 1/tau of Eq. 4."""
        return float(self.model.logit_scale.exp())

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the image tower's input, in pixels."""
        height, width = to_2tuple(self.preprocessing.size)
        return height, width

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of all weights and buffers in memory, and of the preprocessing."""
        digest = hashlib.sha256(repr(self.preprocessing).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    @functools.cached_property
    def checkpoint_digest(self) -> str:
        """A hash of the checkpoint file, for which no weight is loaded."""
        with self.checkpoint.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """open_clip's description of the model."""
        return dict(open_clip.get_model_config(self.name))

    @functools.cached_property
    def preprocess(self) -> Callable[[Any], Tensor]:
        """CLIP's own steps from an image to the input (3, H, W) of its image tower."""
        return image_transform_v2(self.preprocessing, is_train=False)

    @functools.lru_cache(maxsize=8)  # noqa: B019 - a FrozenClip lives as long as its process
    def encoder(
        self,
        names: Names,
        template: Template,
        class_specific: bool,
        depth: int = 1,
        blocks: int | None = None,
    ) -> PromptEncoder | NamesEncoder:
        """Return g(.) for classes with these names, made once; by the first `blocks` if given."""
        try:
            encoder = PromptEncoder(
                self.model if blocks is None else first_blocks(self.model, blocks),
                self.tokenizer,
                [name for own in names for name in own],
                template,
                class_specific=class_specific,
                depth=depth,
                precision=self.precision,
            )
        except ValueError as error:
            raise UsageError(f"clip.model={self.name}: {error}") from error
        counts = [len(own) for own in names]
        return encoder if max(counts) == 1 else NamesEncoder(encoder, counts)

    def embed(self, words: str) -> Tensor:
        """Return the token embeddings (n, D) of plain words, to start a context from."""
        return embed_words(self.model, self.tokenizer, words)

    def n_tokens(self, words: str) -> int:
        """Return how many tokens plain words have."""
        return len(self.embed(words))

    @functools.lru_cache(maxsize=8)  # noqa: B019
    def zeroshot(self, classnames: tuple[str, ...], template: str) -> Tensor:
        """Return hand-written prompts' text features (C, d), L2-normalised."""
        with torch.no_grad():
            texts = [template.replace("{}", name.replace("_", " ")) for name in classnames]
            return encode_text(self.model, self.tokenizer, texts)

    @contextlib.contextmanager
    def image_tower(self) -> Iterator[Any]:
        """Load the image tower, from (B, 3, H, W) to (B, d), and free it at the end.

        Raises UsageError where the checkpoint is gone or torn.
        """
        tower = self._load_tower()
        try:
            yield tower
        finally:
            # Frees the memory even where a traceback still refers to the tower
            tower.to("meta")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    @functools.cached_property
    def tower(self) -> ImageTower:
        """The image tower, loaded when a method first asks for it and kept.

        Raises UsageError where the checkpoint is gone or torn.
        """
        return ImageTower(self._load_tower(), self.name)

    def _load_tower(self) -> Any:
        with weights_errors(self.name, str(self.checkpoint)):
            return load_full_model(self.name, self.checkpoint).visual.to(self.device)


def resolve_device(name: str) -> torch.device:
    """Return the device of the `device` setting; "auto" is CUDA where present."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "setting device='cuda': no CUDA device here; use device=auto or device=cpu"
        )
    return torch.device(name)


def load_clip(settings: ClipSettings, device: str = "auto") -> FrozenClip:
    """Load a model by open_clip's name; one for all clients of a process.

    The weights are a bundled name, a file, or a published tag. The same settings give the same
    object.

    Raises UsageError where the model is unknown or its weights cannot be had.
    """
    on = resolve_device(device)
    low = settings.precision == "bfloat16" or (settings.precision == "auto" and on.type == "cuda")
    precision = torch.bfloat16 if low else torch.float32
    return _load(settings.model, settings.pretrained, on, precision)


def forget_clip() -> None:
    """Free the models of this process; the next `load_clip` reads weights from disk again."""
    _load.cache_clear()


@functools.lru_cache(maxsize=2)
def _load(model: str, pretrained: str, device: torch.device, precision: torch.dtype) -> FrozenClip:
    weights = find_weights(model, pretrained)
    with weights_errors(model, pretrained):
        checkpoint = find_checkpoint(model, weights)
        network = load_text_model(model, checkpoint).to(device)
        tokenizer = open_clip.get_tokenizer(model)
    preprocessing = find_preprocessing(model, weights)
    return FrozenClip(model, network, tokenizer, preprocessing, device, checkpoint, precision)
