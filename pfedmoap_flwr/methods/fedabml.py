"""FedABML (Liu et al., 2023, arXiv 2307.02222): a prior over prompts, a posterior for each client.

The server holds a normal prior over the prompt, independent in every entry: mean mu (`ctx`) and log
variance rho (`log_var`). A client's q starts as the prior p that came, and minimises

    CE at one draw of q + zeta KL(q || p)

with another draw in each step. The server's next prior has the mean of the mu_i, and as variance

    "moments": SUM p_i (sigma_i^2 + (mu_i - mu)^2), that of the mixture of all q_i
    "log": exp(SUM p_i rho_i), which does not see how far the clients are apart

A prediction is the mean probability over S draws.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from pfedmoap_flwr.methods.base import Method, Phase, PromptHead, ServerState, Tensors, Upload, Work
from pfedmoap_flwr.methods.parts import variational
from pfedmoap_flwr.settings import Section, setting


class FedABMLSettings(Section):
    """Settings of FedABML."""

    zeta: float = setting(1e-3, "weight of KL(q || prior)", low=0)
    kl: Literal["sum", "mean"] = setting("sum", "the divergence over the prompt's entries")
    variance: Literal["moments", "log"] = setting("moments", "what the prior's variance becomes")
    std: float = setting(0.01, "sigma of the first prior", above=0)
    samples: int = setting(10, "draws S of a prediction", low=1)


class FedABMLHead(PromptHead):
    """q: the mean `ctx` and `log_var`, both (M, D); `eps` (M, D) is the draw of this step.

    `eps` is a parameter that no phase trains: stacked heads read parameters anew in every step,
    buffers but once. The draws of a prediction are the same for all clients.
    """

    def __init__(self, method: "FedABML") -> None:
        super().__init__(method)
        start = 2 * torch.tensor(method.own.std).log().item()
        self.log_var = nn.Parameter(torch.full_like(self.ctx, start))
        self.eps = nn.Parameter(torch.zeros_like(self.ctx))
        draws = variational.fixed_draws(self.seed, method.own.samples, *self.ctx.shape)
        self.draws = draws.to(self.device)

    def encode(self) -> Tensor:
        """Return text features (S, C, d) of S draws, in training of one."""
        eps = self.eps[None] if self.training else self.draws
        return self.encoder(variational.draws_of(self.ctx, self.log_var, eps))

    def classify(self, image_features: Tensor, encoded: Tensor) -> Tensor:
        """Return the log of the draws' mean probabilities (B, C)."""
        logits = [PromptHead.classify(self, image_features, text) for text in encoded]
        return variational.log_mean_probability(torch.stack(logits))


class FedABML(Method[FedABMLSettings, FedABMLHead]):
    """Means and log variances travel, nothing else."""

    section = FedABMLSettings
    head = FedABMLHead
    personal = ("eps",)
    fidelity = "nearest version: the paper's listing could not be read"

    def schedule(self, head: FedABMLHead, epochs: int) -> list[Phase]:
        """Return one phase: q."""
        return [(epochs, ("ctx", "log_var"))]

    def optimizer(self, work: Work[FedABMLHead], groups: ParamsT) -> torch.optim.Optimizer:
        """Return the default, with another draw in every step."""
        generator = self.generator("eps", work.client_id, work.round)
        optimizer = super().optimizer(work, groups)
        return variational.draw_every_step(optimizer, work.head.eps, generator)

    def loss(
        self, head: FedABMLHead, features: Tensor, labels: Tensor, received: Tensors
    ) -> Tensor:
        """Return cross-entropy at the step's draw, and the weighted divergence from what came."""
        kl = variational.divergence(head.ctx, head.log_var, received["ctx"], received["log_var"])
        kl = kl.sum() if self.own.kl == "sum" else kl.mean()
        return super().loss(head, features, labels, received) + self.own.zeta * kl

    def merge(self, state: ServerState, uploads: Mapping[int, Upload]) -> None:
        """Average both by n_i; "moments": the variance is that of the clients' mixture."""
        super().merge(state, uploads)
        if self.own.variance == "moments":
            sent = [uploads[i] for i in sorted(uploads)]
            weights = torch.tensor([float(u.num_examples) for u in sent], dtype=torch.float64)
            means, log_vars = (
                torch.stack([u.tensors[name] for u in sent]).double() for name in ("ctx", "log_var")
            )
            state.shared["log_var"] = variational.mixture_log_var(means, log_vars, weights).float()
