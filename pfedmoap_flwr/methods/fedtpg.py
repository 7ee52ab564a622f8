"""FedTPG (Qiu et al., ICLR 2024, arXiv 2310.06123): a generator writes the context for the classes.

The prompt is not learned, but a network that makes it out of the names of the classes in question:

    ctx = generator(queries, E),  E (C, d): CLIP's text features of the bare class names
    logits = logit_scale * cos(image_features, text_features(ctx)),  cross-entropy

In training the classes in question are the client's own, when it is measured they are all C.
The server takes the plain mean of queries and generator.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.base import (
    Method,
    PromptHead,
    ServerState,
    Tensors,
    Upload,
    Work,
)
from pfedmoap_flwr.methods.parts.generator import PromptGenerator
from pfedmoap_flwr.methods.parts.mean import average
from pfedmoap_flwr.randomness import torch_generator
from pfedmoap_flwr.settings import Section, setting


class FedTPGSettings(Section):
    """Settings of FedTPG."""

    heads: int = setting(4, "attention heads, a divisor of CLIP's text width", low=1)
    depth: int = setting(0, "layers of self-attention behind the generator's first", low=0)
    own_classes: bool = setting(True, "train among the client's own classes; false: among all")


class FedTPGHead(PromptHead):
    """The queries `ctx` (M, D) and the generator; `held` (C,) says which classes a client has."""

    held: Tensor

    def __init__(self, method: "FedTPG") -> None:
        super().__init__(method)
        own, width = method.own, self.encoder.width
        if width % own.heads:
            raise UsageError(f"setting fedtpg.heads={own.heads}: must divide CLIP's width {width}")
        self.class_features = method.clip.zeroshot(method.task.classnames, "{}")
        generator = torch_generator(self.seed, "generator")
        made = PromptGenerator(width, self.encoder.embed_dim, own.heads, own.depth, generator)
        self.generator = made.to(self.device)
        every = torch.ones(len(method.task.classnames), dtype=torch.bool, device=self.device)
        self.register_buffer("held", every, persistent=False)

    def encode(self) -> Tensor:
        """Return text features (C, d) of the context for the classes in question."""
        seen = self.held if self.training else torch.ones_like(self.held)
        return self.encoder(self.generator(self.ctx, self.class_features, seen))


class FedTPG(Method[FedTPGSettings, FedTPGHead]):
    """PromptFL with a generator in the prompt's place."""

    section = FedTPGSettings
    head = FedTPGHead

    def prepare(self, work: Work[FedTPGHead]) -> None:
        """Note which classes the client has training images of."""
        if self.own.own_classes and len(work.images):
            counts = work.images.labels.bincount(minlength=len(self.task.classnames))
            work.head.held = counts > 0

    def loss(self, head: FedTPGHead, features: Tensor, labels: Tensor, received: Tensors) -> Tensor:
        """Return cross-entropy among the classes that the client has."""
        return F.cross_entropy(head(features).masked_fill(~head.held, -torch.inf), labels)

    def combine(self, state: ServerState, uploads: Mapping[int, Upload]) -> dict[str, Tensor]:
        """Return the plain mean over the participants, whatever their number of images."""
        return average(uploads, state.shared, weights=dict.fromkeys(uploads, 1.0))
