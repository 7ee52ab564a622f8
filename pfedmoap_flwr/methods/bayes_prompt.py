"""Bayesian Prompt Learning (Derakhshani et al., ICCV 2023, arXiv 2210.02390), federated.

A draw r_l (D,) of a normal distribution is added to all context tokens: P_l = ctx + r_l, with
r_l = mu + exp(rho / 2) eps_l for l = 1 .. L. The distribution is one for all images, or a
conditional one, whose mu(x) and rho(x) two networks read off the image. Training and prediction
have the mean probability over the draws:

    loss = - log (1/L) SUM_l p_l(y | x) + beta KL(N(mu, exp rho) || N(0, I))

"paper": KL is the sum over the D entries; "released": their mean.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import ParamsT

from pfedmoap_flwr.methods.base import Method, Phase, PromptHead, Tensors, Work
from pfedmoap_flwr.methods.parts import variational
from pfedmoap_flwr.randomness import torch_generator
from pfedmoap_flwr.settings import Section, setting


class BayesPromptSettings(Section):
    """Settings of Bayesian Prompt Learning."""

    conditional: bool = setting(False, "the distribution depends on the image")
    samples: int = setting(5, "draws L of a step and of a prediction", low=1)
    beta: float = setting(1e-3, "weight of the divergence from N(0, I)", low=0)
    log_var: float = setting(0.0, "where the log variance starts, and within 1 above it")
    prompts: int = setting(512, "conditional: prompts encoded at once", low=1)


class BayesPromptHead(PromptHead):
    """`ctx`, and the distribution of what is added to it, `bias`: vectors (D,), or two networks.

    `eps` (L, D) is what this step draws. It is a parameter that no phase trains: stacked heads read
    parameters anew in every step, buffers but once. A prediction's draws are the same for everyone.
    """

    def __init__(self, method: "BayesPrompt") -> None:
        super().__init__(method)
        self.own = own = method.own
        self.num_classes = len(method.task.classnames)
        sizes = self.encoder.width, self.encoder.embed_dim
        start = torch_generator(self.seed, "distribution")
        self.bias = variational.Distribution(*sizes, start, own.conditional, own.log_var)
        self.eps = nn.Parameter(torch.zeros(own.samples, self.encoder.width))
        self.draws = variational.fixed_draws(self.seed, *self.eps.shape).to(self.device)
        self.to(self.device)

    def encode(self) -> Tensor:
        """Return text features (1, L, C, d); of the conditional form nothing, as images are due."""
        nothing = self.ctx.new_zeros(1, self.encoder.embed_dim)
        return nothing if self.own.conditional else self.text_features(nothing)

    def text_features(self, x: Tensor) -> Tensor:
        """Return text features (B, L, C, d) for unit-norm image features (B, d); B is 1 for all."""
        bias = self.bias(x, self.eps if self.training else self.draws)
        return self.encoder(self.ctx + bias.unflatten(-1, (*[1] * (self.ctx.dim() - 1), -1)))

    def classify(self, image_features: Tensor, encoded: Tensor) -> Tensor:
        """Return the log of the draws' mean probabilities (B, C)."""
        x = F.normalize(image_features, dim=-1)
        if not self.own.conditional:
            return self.mixed(x, encoded)
        # The prompts of all images at once would fill the memory
        most = self.own.prompts // (self.own.samples * self.num_classes)
        return variational.by_parts(self.of_each, x, max(1, most))

    def of_each(self, x: Tensor) -> Tensor:
        """Return (B, C) for unit-norm image features (B, d), each with prompts of its own."""
        return self.mixed(x, self.text_features(x))

    def mixed(self, x: Tensor, text_features: Tensor) -> Tensor:
        """Return (B, C) of unit-norm image features (B, d) and text features (B or 1, L, C, d)."""
        logits = self.logit_scale * torch.einsum("bd,blcd->lbc", x, text_features)
        return variational.log_mean_probability(logits)


class BayesPrompt(Method[BayesPromptSettings, BayesPromptHead]):
    """PromptFL with a distribution of prompts; its mean and log variance are averaged too."""

    section = BayesPromptSettings
    head = BayesPromptHead
    personal = ("eps",)

    def schedule(self, head: BayesPromptHead, epochs: int) -> list[Phase]:
        """Return one phase: everything but the draws."""
        return [(epochs, tuple(name for name, _ in head.named_parameters() if name != "eps"))]

    def optimizer(self, work: Work[BayesPromptHead], groups: ParamsT) -> torch.optim.Optimizer:
        """Return the default, with other draws in every step."""
        generator = self.generator("eps", work.client_id, work.round)
        plain = super().optimizer(work, groups)
        return variational.draw_every_step(plain, work.head.eps, generator)

    def loss(
        self, head: BayesPromptHead, features: Tensor, labels: Tensor, received: Tensors
    ) -> Tensor:
        """Return cross-entropy of the mean probability and the weighted divergence."""
        x, real = F.normalize(features, dim=-1), labels >= 0
        entries = head.bias.divergence(x)
        kl = entries.mean(-1) if self.settings.compat == "released" else entries.sum(-1)
        weighted = self.own.beta * (kl * real).sum() / real.sum()
        return super().loss(head, features, labels, received) + weighted
