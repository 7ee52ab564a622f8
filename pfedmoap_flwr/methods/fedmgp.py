"""FedMGP (Bo et al., NeurIPS 2025, arXiv 2511.00480): groups of prompts, a few of which are shared.

A client has G groups, each a text prompt and so a classifier with text features T_j (C, d); with
`visual` also a prompt inside the image tower, and so image features X_j (B, d) of its own:

    logits_j = X_j T_j' / tau      loss = mean_j CE_j + lambda L_div      logits = mean_j logits_j
    L_div = mean over pairs i < j and classes of cos(T_i, T_j); with X, the mean of that and X's own

It gets s common prompts of either kind and uploads s of its own, drawn by nearness to the common
ones. The server averages those that were drawn first, those drawn second, and so on. At the client
the result takes the places of the prompts that it had uploaded.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from pfedmoap_flwr.clip.features import Reading
from pfedmoap_flwr.methods.base import Method, Phase, PromptHead, ServerState, Tensors, Upload, Work
from pfedmoap_flwr.methods.parts.groups import Groups, likeness, several
from pfedmoap_flwr.settings import Section, setting


class FedMGPSettings(Section):
    """Settings of FedMGP."""

    groups: int = setting(5, "groups G of a client", low=1)
    common: int = setting(2, "groups s that travel; all where it is more", low=1)
    visual: int = setting(0, "tokens of a group's prompt in the image tower; 0: none", low=0)
    lambda_: float = setting(1.0, "weight of the term that keeps groups apart", low=0)
    temperature: float = setting(1.0, "of the draw: small prefers groups like the common", above=0)


class FedMGPHead(PromptHead):
    """The groups' prompts: "text" (G, M, D), and "visual" (G, P, width) where there are any."""

    def __init__(self, method: "FedMGP") -> None:
        super().__init__(method)
        prompts = {"text": several(self, method.own.groups, words=bool(self.template.starts))}
        del self.ctx  # the first group took its place
        if method.own.visual:
            self.tower = method.clip.tower
            sizes = method.own.groups, method.own.visual, self.tower.width
            prompts["visual"] = self.normal("visual groups", *sizes)
        self.groups = Groups(prompts, method.own.common)

    def encode(self) -> Tensor:
        """Return text features (G, C, d)."""
        return self.encoder(self.groups.own["text"])

    def images(self, image_features: Tensor) -> Tensor:
        """Return unit image features (G, B, d) of pixels (B, 3, H, W); (1, B, d) of features."""
        if "visual" not in self.groups.own:
            return F.normalize(image_features, dim=-1)[None]
        found = [self.tower.encode(image_features, own) for own in self.groups.own["visual"]]
        return F.normalize(torch.stack(found), dim=-1)

    def by_group(self, images: Tensor, encoded: Tensor) -> Tensor:
        """Return every group's logits (G, B, C)."""
        pairs = zip(images.expand(len(encoded), -1, -1), encoded, strict=True)
        return torch.stack([self.logit_scale * (image @ text.t()) for image, text in pairs])

    def classify(self, image_features: Tensor, encoded: Tensor) -> Tensor:
        """Return the mean of the groups' logits (B, C)."""
        return self.by_group(self.images(image_features), encoded).mean(0)


class FedMGP(Method[FedMGPSettings, FedMGPHead]):
    """All groups are trained and stay; copies of some travel as `common` and are averaged."""

    section = FedMGPSettings
    head = FedMGPHead
    personal = ("groups.own",)

    @classmethod
    def reads(cls, own: FedMGPSettings) -> Reading:
        """Return pixels for prompts inside the image tower."""
        return Reading("pixels" if own.visual else "features")

    def prepare(self, work: Work[FedMGPHead]) -> None:
        """Put the common prompts in their places; a kept head has there what it uploaded."""
        work.head.groups.receive()

    def schedule(self, head: FedMGPHead, epochs: int) -> list[Phase]:
        """Return one phase: the client's own prompts."""
        return [(epochs, tuple(n for n, _ in head.named_parameters() if self.is_personal(n)))]

    def loss(self, head: FedMGPHead, features: Tensor, labels: Tensor, received: Tensors) -> Tensor:
        """Return the groups' mean cross-entropy and the term; "released": with the other sign."""
        text, images = head.encode(), head.images(features)
        plain = F.cross_entropy(head.by_group(images, text).flatten(0, 1), labels.repeat(len(text)))
        term = likeness(text, images, labels >= 0) if self.own.visual else likeness(text)
        return plain + self.own.lambda_ * (1 - term if self.settings.compat == "released" else term)

    def upload(self, work: Work[FedMGPHead]) -> dict[str, Tensor]:
        """Return the prompts drawn, each kind by itself; in round 1 all are drawn alike."""
        generator = self.generator("groups", work.client_id, work.round)
        work.head.groups.choose(self.own.temperature, generator, alike=work.round == 1)
        return super().upload(work)

    def combine(self, state: ServerState, uploads: Mapping[int, Upload]) -> dict[str, Tensor]:
        """Return the mean by n_i; "released": the plain mean."""
        if self.settings.compat == "released":
            uploads = {i: Upload(upload.tensors, 1) for i, upload in uploads.items()}
        return super().combine(state, uploads)
