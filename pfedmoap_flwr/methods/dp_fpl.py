"""DP-FPL (Tran et al., ICLR 2025, arXiv 2501.13904): noised low-rank gradients of a local prompt.

A client's prompt is ctx + u v + residual, where u and v are factors of its `local` part: its value
is ctx + local, and the factors decide what of a gradient passes (`parts/private_steps.py`):

    logits = logit_scale * cos(image_features, text_features(ctx + local)),  cross-entropy

Every image is in one step of an epoch, and changes what that step takes by a clip norm at the most.
So k epochs of a client are k Gaussian mechanisms, from which its epsilon follows.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from pfedmoap_flwr.methods.base import Method, PromptHead, ServerState, Tensors, Upload, Work
from pfedmoap_flwr.methods.parts.privacy import gaussian, noised
from pfedmoap_flwr.methods.parts.private_steps import PrivateSteps, released_noise
from pfedmoap_flwr.randomness import torch_generator
from pfedmoap_flwr.settings import Section, setting


class DPFPLSettings(Section):
    """Settings of DP-FPL."""

    rank: int = setting(8, "columns of u; n-ctx where it is more", low=1)
    clip_norm: float = setting(10.0, "largest norm C of one image's gradients", above=0)
    noise: float = setting(1.0, "standard deviation of a sum's noise, in clip norms", low=0)
    delta: float = setting(1e-5, "for which epsilon is said", above=0, high=0.5)
    epsilon: float = setting(0.4, "with compat=released, noise follows from it", above=0)


class DPFPLHead(PromptHead):
    """The global prompt `ctx` and the client's `local` part.

    start (D, r): what this round's factors begin with. steps (): how many were taken so far.
    """

    start: Tensor
    steps: Tensor

    def __init__(self, method: "DPFPL") -> None:
        super().__init__(method)
        self.local = self.normal("local", *self.ctx_shape)
        start = torch.zeros_like(self.local.detach().mT[..., : method.own.rank])
        self.register_buffer("start", start, persistent=False)
        self.register_buffer("steps", torch.tensor(0, device=self.device))

    def encode(self) -> Tensor:
        """Return text features (C, d) of ctx + local."""
        return self.encoder(self.ctx + self.local)


class DPFPL(Method[DPFPLSettings, DPFPLHead]):
    """ctx is averaged and local stays; both move by clipped and noised gradients."""

    section = DPFPLSettings
    head = DPFPLHead
    personal = ("local",)
    fidelity = "nearest version: noise in every step of a client, none at the server"

    def private(self) -> PrivateSteps:
        """Return how steps are clipped and noised; "released": sqrt(T ln(1/delta)) / epsilon."""
        own, released = self.own, self.settings.compat == "released"
        rounds = self.settings.num_server_rounds
        noise = released_noise(rounds, own.delta, own.epsilon) if released else own.noise
        return PrivateSteps(own.clip_norm, noise, self.settings.batch_size, released)

    def prepare(self, work: Work[DPFPLHead]) -> None:
        """Draw what this round's factors begin with."""
        generator = self.generator("start", work.client_id, work.round)
        work.head.start = gaussian(work.head.start, 1.0, generator)

    def loss(self, head: DPFPLHead, features: Tensor, labels: Tensor, received: Tensors) -> Tensor:
        """Return cross-entropy, whose gradients to ctx and local are the clipped ones."""

        def losses_of(prompt: Tensor) -> Tensor:
            logits = head.classify(features, head.encoder(prompt))
            return F.cross_entropy(logits, labels, reduction="none")

        return self.private().loss(losses_of, head.ctx, head.local, head.start, labels)

    def optimizer(self, work: Work[DPFPLHead], groups: ParamsT) -> Optimizer:
        """Return the default, which before each step adds noise and counts the step."""
        optimizer, head = super().optimizer(work, groups), work.head
        draws = self.generator("noise", work.client_id, work.round)
        return self.private().watch(optimizer, head.ctx, head.local, head.start, head.steps, draws)

    def metrics(self, work: Work[DPFPLHead]) -> dict[str, float]:
        """Return the client's epsilon so far; none without noise, or with the released one."""
        steps, images = int(work.head.steps), len(work.images)
        epsilon = self.private().epsilon(steps, images, self.own.delta)
        return {} if epsilon is None else {"epsilon": epsilon}

    def merge(self, state: ServerState, uploads: Mapping[int, Upload]) -> None:
        """Average; "released": the server adds to ctx the noise of one step."""
        super().merge(state, uploads)
        if self.private().released:
            generator = torch_generator(self.settings.seed, "server's noise", state.round)
            std = self.lr("ctx", 0, self.settings.local_epochs) * self.private().std / len(uploads)
            state.shared["ctx"] = noised(state.shared["ctx"], std, generator)
