"""The one abstraction: what a client learns, what travels, what the server makes of it.

Every default together is PromptFL: FedAvg (Eq. 6) over one prompt (CoOp's). One rule carries all
methods: the client keeps its whole head; what it receives overwrites by name; what it sends is
everything not named `personal`.

Shapes: B batch, C classes, M context tokens, D text width, d embedding width, K experts, N clients.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pfedmoap_flwr.clip.load import FrozenClip
from pfedmoap_flwr.methods.settings import LearningSettings
from pfedmoap_flwr.randomness import torch_generator
from pfedmoap_flwr.settings import Section

Received = Mapping[str, Tensor]


@dataclass(frozen=True)
class Task:
    """What is told apart: class names in label order, and a sentence with {} for zero-shot."""

    classnames: tuple[str, ...]
    template: str


@dataclass(frozen=True)
class Upload:
    """What one client sent after training: its tensors by name and its n_k."""

    tensors: dict[str, Tensor]
    num_examples: int


@dataclass
class Server:
    """All that the server remembers; saving it is the checkpoint."""

    shared: dict[str, Tensor]
    pool: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    examples: dict[int, int] = field(default_factory=dict)
    round: int = 0
    extra: dict[str, Tensor] = field(default_factory=dict)


class Head(nn.Module):
    """Image features (B, d) -> logits (B, C); its parameters are what is learned.

    `encode` holds all work that does not depend on an image, so that an evaluation does it once.
    """

    def prepare(self) -> None:
        """Compute, unless it is there, what no training step changes: once after each delivery."""

    def encode(self) -> Any:
        """Return what `classify` needs besides images."""
        raise NotImplementedError

    def classify(self, image_features: Tensor, encoded: Any) -> Tensor:
        """Return logits (B, C)."""
        raise NotImplementedError

    def forward(self, image_features: Tensor) -> Tensor:
        """Return logits (B, C) of image features (B, d)."""
        return self.classify(image_features, self.encode())

    def receive(self, tensors: Received) -> None:
        """Overwrite by name; names the head does not have are for the loss."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name in tensors:
                    parameter.copy_(tensors[name])

    def kept(self) -> dict[str, Tensor]:
        """Return what the client keeps on disk: a detached CPU copy of its whole state."""
        return {name: t.detach().cpu().clone() for name, t in self.state_dict().items()}


class PromptHead(Head):
    """CoOp's learner: ctx (M, D), or (C, M, D) class-specific, in front of the frozen text tower.

    logit^(c) = sim(f(x), g(P^(c))) / tau (Eq. 3 and 4).
    """

    def __init__(
        self, clip: FrozenClip, classnames: tuple[str, ...], settings: LearningSettings
    ) -> None:
        super().__init__()
        prompt = settings.prompt
        words = clip.embed(prompt.ctx_init) if prompt.ctx_init else None
        n_ctx = prompt.n_ctx if words is None else len(words)
        self.encoder = clip.encoder(
            classnames, n_ctx, prompt.class_token_position, prompt.class_specific
        )
        if words is None:
            shape = (len(classnames),) * prompt.class_specific + (n_ctx, self.encoder.width)
            generator = torch_generator(settings.seed, "ctx")
            ctx = torch.empty(shape).normal_(std=0.02, generator=generator)
        else:
            ctx = words.expand(len(classnames), -1, -1) if prompt.class_specific else words
        self.ctx = nn.Parameter(ctx.detach().clone().to(clip.device))
        self.logit_scale = clip.logit_scale

    def encode(self) -> Any:
        """Return text features (C, d)."""
        return self.encoder(self.ctx)

    def classify(self, image_features: Tensor, encoded: Any) -> Tensor:
        """Return logits (B, C) from text features (C, d)."""
        return self.logit_scale * (image_features @ encoded.t())


class Method:
    """One federated method. Subclasses override what differs from PromptFL, and nothing else.

    `reads` is what a head gets of an image: "features" (B, d) or patch "tokens" (B, T, d). With
    `views` V, a loss gets V augmentations of each training image: (B, V, d) or (B, V, T, d).
    """

    section: ClassVar[type[Section]] = Section
    personal: tuple[str, ...] = ()
    reads: Literal["features", "tokens", "pixels"] = "features"
    views: int = 0

    def __init__(self, settings: Any) -> None:
        self.settings: LearningSettings = settings
        self.own = settings.own

    def build(self, clip: FrozenClip, task: Task) -> Head:
        """Return a fresh head, the same for every client: its start is a function of the seed."""
        return PromptHead(clip, task.classnames, self.settings)

    def loss(self, head: Head, features: Tensor, labels: Tensor, received: Received) -> Tensor:
        """Return the training loss of a batch: features (B, d), labels (B,)."""
        return F.cross_entropy(head(features), labels)

    def schedule(self, head: Head, epochs: int) -> list[tuple[int, tuple[str, ...]]]:
        """Return the phases of a local training: (epochs, names of the parameters that move)."""
        return [(epochs, tuple(name for name, _ in head.named_parameters()))]

    def lr(self, name: str, epoch: int, epochs: int) -> float:
        """Return the learning rate of a parameter in an epoch (from 0) of a local training.

        "paper": constant. "released": that code's scheduler, fresh for each client: one epoch at
        1e-5, then a cosine over the local epochs.
        """
        if self.settings.compat == "paper":
            return self.settings.lr
        if epoch == 0:
            return 1e-5
        return self.settings.lr * (1 + math.cos(math.pi * (epoch - 1) / epochs)) / 2

    def sgd(self) -> dict[str, Any]:
        """Return SGD's other settings: none in "paper", the released code's in "released"."""
        if self.settings.compat == "paper":
            return {}
        return {"momentum": 0.9, "weight_decay": 5e-4}

    def is_personal(self, name: str) -> bool:
        """Tell whether a parameter never leaves its client: `personal` lists names and prefixes."""
        return any(name == p or name.startswith(p + ".") for p in self.personal)

    def upload(self, head: Head, received: Received) -> dict[str, Tensor]:
        """Return what goes up: every parameter that is not personal."""
        return {
            name: parameter.detach().cpu().clone()
            for name, parameter in head.named_parameters()
            if not self.is_personal(name)
        }

    def start(self, head: Head) -> Server:
        """Return the server's state before round 1 (P_g^0)."""
        return Server(shared=self.upload(head, {}))

    def send(self, server: Server, client: int, *, train: bool) -> dict[str, Tensor]:
        """Return what goes down to one client, to train on or to evaluate."""
        return dict(server.shared)

    def deliveries(
        self, server: Server, clients: Sequence[int], *, train: bool
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yield what goes down to each client of a round: override where all at once is faster."""
        for client in clients:
            yield client, self.send(server, client, train=train)

    def merge(self, server: Server, uploads: Mapping[int, Upload]) -> None:
        """Turn a round's uploads into the next server state: Eq. 6 and Eq. 7.

        P_g^t = SUM p_i P_i^t with p_i = n_i / SUM n over the participants; pool_t[i] <- P_i^t.
        """
        if not uploads:
            return
        total = sum(upload.num_examples for upload in uploads.values())
        for name, old in server.shared.items():
            mean = torch.zeros_like(old, dtype=torch.float64)
            for client in sorted(uploads):
                upload = uploads[client]
                mean += upload.tensors[name].double() * (upload.num_examples / total)
            server.shared[name] = mean.to(old.dtype)
        for client, upload in uploads.items():
            server.pool[client] = upload.tensors
            server.examples[client] = upload.num_examples
