"""A shared prompt and groups' own behind it; an image chooses its group by keys (SGPT, 2310.18285).

Either the prompts are of text, or they lie inside the image tower. Logits are those of the shared
prompt alone, or of the shared prompt and an image's group. With a group the shared prompt is held
still: no gradient reaches it.

Shapes: B images, C classes, G groups, M context tokens, D text width, d embedding width.
"""

from typing import Any

import torch
from torch import Tensor

from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.base import Method, PromptHead
from pfedmoap_flwr.methods.parts.keys import Keys
from pfedmoap_flwr.randomness import torch_generator


class KeyedHead(PromptHead):
    """The shared prompt `ctx` (M, D), the groups' (G, tokens, D), and keys."""

    def __init__(self, method: Method[Any, Any]) -> None:
        super().__init__(method)
        self.place(method)
        (*lead, _, width), own = self.ctx.shape, method.own
        self.groups = self.normal("groups", own.groups, *lead, own.tokens, width)
        generator, width = torch_generator(self.seed, "keys"), self.encoder.embed_dim
        self.choice = Keys(own.groups, width, generator, together=own.together).to(self.device)

    def place(self, method: Method[Any, Any]) -> None:
        """Make what reads a shared prompt and a group's together: the text tower."""
        prompt = method.settings.prompt
        if prompt.template or prompt.depth > 1:
            raise UsageError("prompt.template, prompt.depth: sgpt has a template of its own")
        n_ctx = self.ctx_shape[-2] + method.own.tokens
        self.longer = self.verbalized(method.encoder(prompt.layout(method.clip.n_tokens, n_ctx)))

    def encode(self) -> Tensor:
        """Return text features (G, C, d) of the shared prompt, held still, with each group's."""
        shared = self.ctx.detach().expand(len(self.groups), *self.ctx.shape)
        return self.longer(torch.cat([shared, self.groups], dim=-2))

    def raw(self, images: Tensor) -> Tensor:
        """Return the frozen tower's image features (B, d), not normalised."""
        return images

    def alone(self, images: Tensor) -> Tensor:
        """Return logits (B, C) by the shared prompt alone."""
        return super().classify(images, self.encoder(self.ctx))

    def joint(self, images: Tensor, groups: Tensor, encoded: Tensor) -> Tensor:
        """Return logits (B, C) by the shared prompt, held still, and each image's group (B,)."""
        logits = torch.stack([super(KeyedHead, self).classify(images, each) for each in encoded], 1)
        return logits.take_along_dim(groups[:, None, None], dim=1).squeeze(1)

    def classify(self, image_features: Tensor, encoded: Tensor) -> Tensor:
        """Return logits (B, C), each image with the group that is the least apart."""
        groups = self.choice.nearest(self.raw(image_features))
        return self.joint(image_features, groups, encoded)


class KeyedImageHead(KeyedHead):
    """Prompts of the image tower's width inside it; classes are the task's sentences."""

    def place(self, method: Method[Any, Any]) -> None:
        """Make what reads a shared prompt and a group's together: the image tower."""
        self.tower = method.clip.tower
        self.sentences = method.clip.zeroshot(method.task.classnames, method.task.template)
        self.ctx = self.normal("visual", method.own.visual, self.tower.width)

    def encode(self) -> Tensor:
        """Return the sentences' text features (C, d)."""
        return self.sentences

    @torch.no_grad()
    def raw(self, images: Tensor) -> Tensor:
        """Return the features (B, d) that the tower gives without prompts."""
        return self.tower.encode(images)

    def alone(self, images: Tensor) -> Tensor:
        """Return logits (B, C) by the shared prompt alone."""
        return PromptHead.classify(self, self.tower.encode(images, self.ctx), self.sentences)

    def joint(self, images: Tensor, groups: Tensor, encoded: Tensor) -> Tensor:
        """Return logits (B, C) by the shared prompt, held still, and each image's group (B,)."""
        shared = self.ctx.detach().expand(len(images), -1, -1)
        prompts = torch.cat([shared, self.groups[groups]], dim=1)
        return PromptHead.classify(self, self.tower.encode(images, prompts[:, None]), encoded)
