"""FedDDA (Yang et al., ICML 2025): prompts and image features, each with a shared and a local part.

The prompt of class c is [ctx] c "with a style of" [local]: `ctx` is averaged, `local` stays. The
image feature x, not normalised, becomes a mixture of itself and of two adapters' outputs:

    x' = p_0 x + p_1 A_specific(x) + p_2 A_common(x), p = softmax(W x), A(x) = ReLU(W2 ReLU(W1 x))
    logit^(c) = logit_scale cos(x', text_features^(c))
"""

import torch
from torch import Tensor, nn

from pfedmoap_flwr.clip.template import parse
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.base import Method, PromptHead
from pfedmoap_flwr.methods.parts.adapters import Bottleneck
from pfedmoap_flwr.methods.parts.gate import linear
from pfedmoap_flwr.randomness import torch_generator
from pfedmoap_flwr.settings import Section

STYLE = "with a style of"


class FedDDAHead(PromptHead):
    """Shared: `ctx`, the adapter `common`. The client's: `local`, the adapter `specific`, `gate`.

    Both contexts together have n_ctx tokens, `ctx` the first half of them.
    """

    def __init__(self, method: "FedDDA") -> None:
        super().__init__(method)
        n_ctx, width = self.ctx_shape[-2], self.encoder.embed_dim
        if n_ctx < 2:
            raise UsageError(f"setting prompt.n-ctx={n_ctx}: feddda divides it, so it must be >= 2")
        if method.settings.prompt.template or method.settings.prompt.depth > 1:
            raise UsageError("prompt.template, prompt.depth: feddda has a template of its own")
        sizes = [n_ctx // 2, n_ctx - n_ctx // 2]
        text = f"{{soft:{sizes[0]}}} {{class}} {STYLE} {{soft:{sizes[1]}}}."
        self.encoder = self.verbalized(method.encoder(parse(text, method.clip.n_tokens)))
        halves = self.ctx.detach().split(sizes, dim=-2)
        self.ctx, self.local = (nn.Parameter(half.clone()) for half in halves)
        self.common = Bottleneck(width, torch_generator(self.seed, "common")).to(self.device)
        self.specific = Bottleneck(width, torch_generator(self.seed, "specific")).to(self.device)
        gate = linear(width, 3, torch_generator(self.seed, "gate"), bias=False)
        self.gate = gate.to(self.device)

    def encode(self) -> Tensor:
        """Return text features (C, d), the class names between the two contexts."""
        return self.encoder(torch.cat([self.ctx, self.local], dim=-2))

    def classify(self, image_features: Tensor, encoded: Tensor) -> Tensor:
        """Return logits (B, C) of image features (B, d)."""
        x = image_features
        parts = torch.stack([x, self.specific(x), self.common(x)], dim=1)
        mixed = torch.einsum("bk,bkd->bd", self.gate(x).softmax(-1), parts)
        return super().classify(mixed, encoded)


class FedDDA(Method[Section, FedDDAHead]):
    """All is trained together by cross-entropy; `ctx` and the common adapter are averaged."""

    head = FedDDAHead
    personal = ("local", "specific", "gate")
