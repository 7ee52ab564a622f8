"""Prompt + FedAMP (Huang et al., AAAI 2021, arXiv 2007.03797): attentive message passing.

Every client has a cloud prompt u_i on the server, a mix of its own prompt and of those like it:

    u_i = SUM_j!=i xi_ij P_j + (1 - SUM_j!=i xi_ij) P_i
    xi_ij = alphaK exp(-||P_i - P_j||^2 / sigma) / sigma

A client starts from u_i and minimises CE + lambda / (2 alphaK) ||P - u_i||^2.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pfedmoap_flwr.methods.base import Deliveries, Method, PromptHead, ServerState, Tensors, Upload
from pfedmoap_flwr.settings import Section, setting


class FedAMPSettings(Section):
    """Settings of FedAMP."""

    alpha_k: float = setting(0.05, "step towards the others, alphaK; 0: every client alone", low=0)
    sigma: float = setting(
        1.0, "width of the attention, in median squared distances of prompts", above=0
    )
    lambda_: float = setting(1.0, "weight of the pull, lambda / alphaK of the paper", low=0)


class FedAMP(Method[FedAMPSettings]):
    """The server keeps all prompts and sends each client its mix; the client is pulled to it."""

    section = FedAMPSettings

    def loss(self, head: PromptHead, features: Tensor, labels: Tensor, received: Tensors) -> Tensor:
        """Return cross-entropy and the pull towards the cloud prompt."""
        apart = (head.ctx - received["ctx"]).square().sum()
        return super().loss(head, features, labels, received) + self.own.lambda_ / 2 * apart

    def send(self, state: ServerState, client_ids: Sequence[int], *, train: bool) -> Deliveries:
        """Return u_i to train on; the plain mean to a newcomer, and to be measured as global."""
        sent = super().send(state, client_ids, train=train)
        known = sorted(state.pool)
        if train and known:
            prompts = torch.stack([state.pool[i]["ctx"] for i in known])
            mixed = cloud(prompts.flatten(1).double(), self.own.alpha_k, self.own.sigma)
            for i, u in zip(known, mixed.to(prompts.dtype), strict=True):
                if i in sent:
                    sent[i] = {"ctx": u.view_as(prompts[0])}
        return sent

    def merge(self, state: ServerState, uploads: Mapping[int, Upload]) -> None:
        """Keep every prompt, and their mean for newcomers."""
        super().merge(state, uploads)
        state.pool |= {i: {"ctx": upload.tensors["ctx"]} for i, upload in uploads.items()}


def cloud(prompts: Tensor, alpha_k: float, sigma: float) -> Tensor:
    """Return the cloud prompts u (N, n) of prompts (N, n), sigma in median squared distances.

    Prompts of thousands of numbers lie so far apart that with the paper's plain sigma every weight
    would be 0. So sigma is counted in the median squared distance of all pairs.
    """
    squared = torch.stack([(prompts - prompt).square().sum(-1) for prompt in prompts])
    pairs = squared[~torch.eye(len(prompts), dtype=torch.bool)]
    median = pairs.median().clamp_min(torch.finfo(pairs.dtype).tiny) if len(pairs) else 1.0
    return mix(prompts, alpha_k * torch.exp(-squared / (sigma * median)) / sigma)


def mix(prompts: Tensor, xi: Tensor) -> Tensor:
    """Return u (N, n) of prompts (N, n) and attention xi (N, N), whose diagonal does not count.

    Where the others' weights come to more than 1 they are scaled to 1, or a client's own prompt
    would get a negative weight.
    """
    xi = xi * (1 - torch.eye(len(prompts), dtype=xi.dtype))
    others = xi.sum(dim=1, keepdim=True)
    xi = xi / others.clamp_min(1)
    return xi @ prompts + (1 - others.clamp_max(1)) * prompts
