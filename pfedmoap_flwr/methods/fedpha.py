"""FedPHA (Fang et al., ICML 2025, PMLR 267): a global prompt of one length, local ones of any.

A client trains the global prompt ctx (M, D) and its own, local (L, D) with L <= M. With T_g, T_l
and T_p the text features of ctx, local and local projected, and mean over the classes:

    ctx = U S V',  projected = local V2 V2',  V2: the right singular vectors but for the strongest
    loss = CE(T_l) + CE(T_g) + mean((T_l - T_p)^2) + mean(max(0, alpha - ||T_l - T_g||))

The third term pulls the local prompt away from the strongest directions of the global one, the
fourth pushes the two prompts' features apart. A client predicts with its local prompt alone.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.base import Method, PromptHead, Tensors, Work
from pfedmoap_flwr.settings import Section, setting


class FedPHASettings(Section):
    """Settings of FedPHA."""

    alpha: float = setting(1.0, "distance of features up to which the prompts are pushed", low=0)
    ratio: float = setting(0.8, "share of the singular vectors that V2 keeps", above=0, high=1)
    shortest: int = setting(4, "fewest tokens of a local prompt; n-ctx where it is more", low=1)


class FedPHAHead(PromptHead):
    """The global prompt `ctx` and the client's `local` one, of which the tokens `used` (L,) count.

    trained: 1 once the client has a local prompt of its own; before, ctx predicts.
    """

    used: Tensor
    trained: Tensor

    def __init__(self, method: "FedPHA") -> None:
        super().__init__(method)
        n_ctx = self.ctx_shape[-2]
        if method.settings.prompt.depth > 1:
            raise UsageError("setting prompt.depth: fedpha's prompts enter the input alone")
        self.kept = math.ceil(method.own.ratio * min(self.ctx_shape[-2:]))
        self.local = self.normal("local", *self.ctx_shape)
        # Its shape says how long the prompt is, so heads of two lengths are never stacked
        self.register_buffer("used", torch.arange(n_ctx, device=self.device), persistent=False)
        self.register_buffer("trained", torch.tensor(0, device=self.device))
        self.local_encoder = self.encoder

    def encode(self) -> Tensor:
        """Return text features (C, d) of the prompt that predicts."""
        if not self.trained:
            return self.encoder(self.ctx)
        return self.local_encoder(self.local.index_select(-2, self.used))

    def features(self, ctx: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return T_g, T_l and T_p, (C, d) each; the projection is onto directions of `ctx`."""
        local = self.local.index_select(-2, self.used)
        pair = torch.stack([local, project(local, ctx, self.kept)])
        text_local, text_projected = self.local_encoder(pair)
        return self.encoder(self.ctx), text_local, text_projected


class FedPHA(Method[FedPHASettings, FedPHAHead]):
    """The global prompt is averaged, the local one stays; both are trained together."""

    section = FedPHASettings
    head = FedPHAHead
    personal = ("local",)
    fidelity = "faithful to the released code's equations"

    def prepare(self, work: Work[FedPHAHead]) -> None:
        """Give the client's local prompt its length, drawn once and for all."""
        head, prompt, n_ctx = work.head, self.settings.prompt, work.head.ctx_shape[-2]
        shortest = min(self.own.shortest, n_ctx)
        generator = self.generator("length", work.client_id, 0)
        length = int(torch.randint(shortest, n_ctx + 1, (), generator=generator))
        head.used = torch.arange(length, device=head.device)
        shorter = self.encoder(prompt.layout(self.clip.n_tokens, length))
        head.local_encoder = head.verbalized(shorter)

    def loss(self, head: FedPHAHead, features: Tensor, labels: Tensor, received: Tensors) -> Tensor:
        """Return the four terms; "released": through V2, the third moves ctx as well."""
        released = self.settings.compat == "released"
        text, local, projected = head.features(head.ctx if released else head.ctx.detach())
        right = [F.cross_entropy(head.classify(features, t), labels) for t in (local, text)]
        return right[0] + right[1] + align(text, local, projected, self.own.alpha)

    def upload(self, work: Work[FedPHAHead]) -> dict[str, Tensor]:
        """Return the global prompt; from now on the client predicts with its local one."""
        work.head.trained = torch.ones_like(work.head.trained)
        return super().upload(work)


def project(local: Tensor, ctx: Tensor, kept: int) -> Tensor:
    """Return local (..., L, D) on the `kept` weakest right singular vectors of ctx (..., M, D)."""
    vectors = torch.linalg.svd(ctx, full_matrices=False).Vh[..., -kept:, :]
    return local @ vectors.mT @ vectors


def align(text: Tensor, local: Tensor, projected: Tensor, alpha: float) -> Tensor:
    """Return the pull of T_l to T_p and its push from T_g; features (C, d), unit-norm."""
    pull = (local - projected).square().mean()
    push = F.relu(alpha - (local - text).norm(dim=-1)).mean()
    return pull + push
