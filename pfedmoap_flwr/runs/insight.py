"""What a personal model has learned, as far as people can read it.

Shapes: B images, C classes, K borrowed experts, D text width, d embedding width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pfedmoap_flwr.clip.words import nearest_words
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.pfedmoap import PFedMoAPHead

if TYPE_CHECKING:
    from pfedmoap_flwr.runs.model import Model

PROMPTS = ("ctx", "local", "experts", "groups")
"""Names of parameters, and of lists of them, that stand among words in a prompt."""


@dataclass(frozen=True)
class NearWord:
    """A word that a learned vector is near to, by the Euclidean distance of embeddings.

    prompt: the parameter. part: its class, or its number where it has several prompts. token, rank:
    from 1.
    """

    prompt: str
    part: str
    token: int
    rank: int
    word: str
    distance: float


@torch.no_grad()
def attention(model: "Model", features: Tensor) -> Tensor:
    """Return how much of each expert images take, (B, K+1, C), the client's own first.

    features: of images (B, d), as `Model.read` has them. Mean over the gate's heads.
    Raises UsageError where the model has no gate, or borrowed nothing.
    """
    head = model.head
    if not isinstance(head, PFedMoAPHead) or head.gate is None:
        raise UsageError(f"{model.meaning.method_name} has no gate in this run")
    if head.experts is None or not len(head.experts):
        raise UsageError(f"client {model.meaning.client} has borrowed no expert yet")
    images = head.reduce(F.normalize(features, dim=-1))
    found = head.gate.attention(images, head.all_experts(head.encode())).mean(dim=0)
    return found.expand(-1, -1, len(model.classnames))


def owner_names(model: "Model", count: int) -> list[str]:
    """Return whose each of K+1 experts is: "own", and client ids where they are known."""
    owners = model.meaning.owners
    if owners is None or len(owners) != count - 1:
        return ["own", *(f"expert {i}" for i in range(1, count))]
    return ["own", *(f"client {i}" for i in owners)]


@torch.no_grad()
def near_words(model: "Model", count: int) -> list[NearWord]:
    """Return the nearest words of each learned vector of the model's prompts.

    Raises UsageError where the method learns no such vectors.
    """
    clip, classes = model.method.clip, model.classnames
    found = []
    for name, prompts in _prompts(model):
        specific = model.method.settings.prompt.class_specific and len(prompts) == len(classes)
        for number, prompt in enumerate(prompts):
            part = classes[number] if specific else str(number + 1) if len(prompts) > 1 else ""
            near = nearest_words(clip.model, clip.tokenizer, prompt, count)
            found += [
                NearWord(name, part, token, rank, word, distance)
                for token, words in enumerate(near, start=1)
                for rank, (word, distance) in enumerate(words, start=1)
            ]
    if not found:
        raise UsageError(f"{model.meaning.method_name} learns no vectors that stand among words")
    return found


def _prompts(model: "Model") -> Iterator[tuple[str, Tensor]]:
    """Yield names and prompts (P, M, D) that are read where words are, P of them in each."""
    head, settings = model.head, model.method.settings.prompt
    encoder = getattr(head, "encoder", None)
    if encoder is None:
        return
    # With depth, those that enter deeper layers follow: no words are there
    first = encoder.n_ctx // settings.depth
    named: dict[str, Tensor] = dict(head.named_parameters())
    written = getattr(head, "ctx", None)
    if "ctx" not in named and isinstance(written, Tensor):
        named = {"ctx": written, **named}
    for name, tensor in named.items():
        among = name.partition(".")[0] in PROMPTS and tensor.dim() in (2, 3)
        if among and tensor.shape[-1] == encoder.width and tensor.numel():
            prompts = tensor if tensor.dim() == 3 else tensor[None]
            yield name, prompts[:, :first] if settings.depth > 1 else prompts


@torch.no_grad()
def text_features(model: "Model") -> Tensor | None:
    """Return the model's text features (C, d), several of a class by their mean; or None."""
    head: nn.Module = model.head.eval()
    encoded = model.head.encode()
    if not isinstance(encoded, Tensor):
        return None
    width = getattr(getattr(head, "encoder", None), "embed_dim", 0)
    if encoded.dim() == 3:
        encoded = encoded.mean(dim=0)
    return encoded if encoded.shape == (len(model.classnames), width) else None
