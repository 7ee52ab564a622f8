"""One local training step with a choice of text encoder, so that two forms differ in nothing else.

Shapes: B images, C classes, K experts, M context tokens, D text width, d embedding width.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transform import PreprocessCfg
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from pfedmoap_flwr import config
from pfedmoap_flwr.assets import asset
from pfedmoap_flwr.clip.load import FrozenClip
from pfedmoap_flwr.clip.text import PromptEncoder
from pfedmoap_flwr.data.federated import Task
from pfedmoap_flwr.methods.base import Split, Work
from pfedmoap_flwr.methods.pfedmoap import PFedMoAP

BATCH = 32
NAMES = Path(__file__).parent / "names"


def random_clip(name: str, device: torch.device) -> FrozenClip:
    """Return an open_clip model with random weights: speed does not depend on them.

    Its image tower is kept, for the reference.
    """
    logging.disable(logging.WARNING)  # open_clip warns that no weights were loaded
    torch.manual_seed(0)
    open_clip.add_model_config(asset("clip"))  # the bundled mini
    network = open_clip.create_model(name, pretrained=None, device=device)
    logging.disable(logging.NOTSET)
    network.eval().requires_grad_(False)
    tokenizer = open_clip.get_tokenizer(name)
    return FrozenClip(name, network, tokenizer, PreprocessCfg(), device, Path())


def classnames(count: int) -> tuple[str, ...]:
    """Return DTD's 47 names, the first of Flowers102's, or, beyond 102, a texture and a flower."""
    textures = (NAMES / "dtd.txt").read_text().splitlines()
    flowers = (NAMES / "flowers102.txt").read_text().splitlines()
    if count == len(textures):
        return tuple(textures)
    if count <= len(flowers):
        return tuple(flowers[:count])
    last_words = dict.fromkeys(flower.split()[-1] for flower in flowers)
    pairs = [f"{texture} {flower}" for texture in textures for flower in last_words]
    if count > len(pairs):
        raise ValueError(f"{count} classes; there are names for at most {len(pairs)}")
    return tuple(pairs[i * len(pairs) // count] for i in range(count))


class FullLength:
    """CoOp's text encoder: C padded sequences (77 tokens) through open_clip's own modules."""

    def __init__(self, clip: FrozenClip, names: tuple[str, ...], n_ctx: int) -> None:
        self.text = clip.model
        ids = clip.tokenizer([" ".join(["X"] * n_ctx) + f" {name}." for name in names])
        self.ids = ids.to(clip.device)
        words = self.text.token_embedding(self.ids)
        self.before, self.after = words[:, :1], words[:, 1 + n_ctx :]

    def __call__(self, ctx: Tensor) -> Tensor:
        """Text features (..., C, d) of contexts (..., M, D), one prompt after another."""
        if ctx.dim() > 2:
            return torch.stack([self(one) for one in ctx])
        text = self.text
        x = torch.cat([self.before, ctx.expand(len(self.ids), -1, -1), self.after], dim=1)
        x = text.transformer(x + text.positional_embedding, attn_mask=text.attn_mask)
        ends = self.ids.argmax(dim=-1)
        x = text.ln_final(x)[torch.arange(len(x), device=x.device), ends] @ text.text_projection
        return x / x.norm(dim=-1, keepdim=True)


class Given:
    """Random text features at no cost: what is left of a step is gate, loss and update."""

    def __init__(self, clip: FrozenClip, classes: int, experts: int, width: int) -> None:
        features = torch.randn(experts + 1, classes, width, device=clip.device)
        local, self.experts = F.normalize(features, dim=-1).split([1, experts])
        self.local = local[0].clone().requires_grad_()

    def __call__(self, ctx: Tensor) -> Tensor:
        """Features (C, d) of the local context (M, D), or (K, C, d) of the experts' (K, M, D)."""
        return self.local if ctx.dim() == 2 else self.experts


class Step:
    """Forward, backward and SGD update of prompt and gate on a batch of cached image features.

    Experts' text features are fixed, as after a delivery; with none the head is a plain prompt.
    """

    def __init__(self, clip: FrozenClip, classes: int, experts: int, **prompt: Any) -> None:
        torch.manual_seed(0)
        settings = config.parse({"method": "pfedmoap", **prompt})
        self.clip, self.names = clip, classnames(classes)
        method = PFedMoAP(settings, settings.own, clip, Task(self.names, ""))
        head: Any = method.build()
        self.head = head
        self.ours: PromptEncoder = head.encoder
        self.n_ctx = self.ours.n_ctx
        self.ours.memory = 0  # what is measured is encoding, not remembering
        self.given = Given(clip, classes, experts, self.ours.embed_dim)
        features = torch.randn(BATCH, self.ours.embed_dim, device=clip.device)
        self.features = F.normalize(features, dim=-1)
        self.labels = torch.randint(classes, (BATCH,), device=clip.device)
        head.encoder = self.given
        received = {}
        if experts:
            received["experts"] = 0.02 * torch.randn(experts, self.n_ctx, self.ours.width)
        head.load(received)
        images = Split(self.features, self.labels)
        method.prepare(Work(0, 1, head, lambda name: images, received))
        parameters = self.head.named_parameters()
        groups = [{"params": [p], "lr": method.lr(name, 0, 1)} for name, p in parameters]
        self.optimizer = torch.optim.SGD(groups)

    def full_length(self) -> FullLength:
        """Return the reference's text encoder for the same prompts."""
        return FullLength(self.clip, self.names, self.n_ctx)

    def by(self, encoder: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        """Return the step as a function of nothing, with this text encoder."""

        def step() -> None:
            self.head.encoder = encoder
            loss = F.cross_entropy(self.head(self.features), self.labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

        return step

    def outcome(self, encoder: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Return the logits (B, C) and the gradient of the loss by ctx (M, D); nothing moves."""
        self.head.encoder = encoder
        logits = self.head(self.features)
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, self.labels), self.head.ctx)
        return logits.detach(), gradient

    def count(self, encoder: Callable[[Tensor], Tensor]) -> tuple[int, int]:
        """Return a step's bytes saved for backward and its FLOPs, both exact.

        Bytes are of distinct storages; those of weights and buffers are not counted.
        """
        held = [*self.clip.model.parameters(), *self.clip.model.buffers()]
        held += [*self.head.parameters(), *self.head.buffers()]
        weights = {tensor.untyped_storage().data_ptr() for tensor in held}
        saved: dict[int, Any] = {}  # holds the storages, lest an address be given out twice

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = storage
            return tensor

        with (
            FlopCounterMode(display=False) as flops,
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            self.by(encoder)()
        return sum(storage.nbytes() for storage in saved.values()), flops.get_total_flops()
