"""DisPFL (Dai et al., ICML 2022, arXiv 2206.00187): sparse prompts, passed from client to client.

A client holds the entries of the prompt that its own mask m_i names. It hears of some neighbours,
through a server that computes nothing, and starts a round from what they and it hold:

    w = m_i * SUM_j m_j w_j / SUM_j m_j

It trains with a masked gradient, and then exchanges a part of its mask (`parts/masks.py`), for the
next round: small weights go, entries with a large gradient come.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from pfedmoap_flwr.methods.base import Deliveries, Method, PromptHead, ServerState, Upload, Work
from pfedmoap_flwr.methods.parts import masks
from pfedmoap_flwr.settings import Section, setting


class DisPFLSettings(Section):
    """Settings of DisPFL."""

    density: float = setting(0.5, "share of the prompt that a client holds", above=0, high=1)
    topology: Literal["random", "ring", "full"] = setting("random", "who is whose neighbour")
    num_neighbours: int = setting(10, "random: neighbours of a client, or all there are", low=0)
    anneal: float = setting(0.5, "share of a mask exchanged at first", low=0, high=1)
    anneal_rounds: int = setting(10, "rounds after which masks stay as they are", low=1)
    clip: float = setting(10.0, "largest norm of a step's gradient", above=0)
    decay: float = setting(5e-4, "pull of the held entries towards 0", low=0)
    lr_factor: float = setting(0.998, "of the rate, from round to round", above=0, high=1)


class DisPFLHead(PromptHead):
    """The prompt, and the mask (M, D) for the client's next training; before its first none."""

    mask: Tensor

    def __init__(self, method: "DisPFL") -> None:
        super().__init__(method)
        self.register_buffer("mask", torch.zeros_like(self.ctx, dtype=torch.bool))


class DisPFL(Method[DisPFLSettings, DisPFLHead]):
    """The server passes masked prompts and masks on; every client makes its own mean of them."""

    section = DisPFLSettings
    head = DisPFLHead

    def reports(self) -> dict[str, Tensor]:
        """Return `mask` (M, D): which entries of the prompt a client held in this round."""
        return {"mask": self.build().mask}

    def prepare(self, work: Work[DisPFLHead]) -> None:
        """Start from the mean of those who hold an entry, where the client's own mask is."""
        head, came = work.head, work.received
        if "neighbours" in came:  # else it is measured, with what it has
            if not head.mask.any():
                draws = self.generator("mask", work.client_id, 0)
                head.mask = masks.drawn(head.ctx_shape, self.own.density, draws).to(head.device)
            head.ctx.data.copy_(masks.start(head.ctx.detach(), came, head.mask))

    def optimizer(self, work: Work[DisPFLHead], groups: ParamsT) -> Optimizer:
        """Return SGD that moves what the mask holds."""
        factor = self.own.lr_factor ** (work.round - 1)
        return masks.MaskedSGD(groups, work.head.mask, self.own.clip, self.own.decay, factor)

    def upload(self, work: Work[DisPFLHead]) -> dict[str, Tensor]:
        """Return the prompt and its mask; the head keeps the mask of the next round."""
        head, images, own = work.head, work.images, self.own
        sent = super().upload(work) | {"mask": head.mask.cpu()}
        draws = self.generator("regrow", work.client_id, work.round)
        rows = torch.randperm(len(images), generator=draws)[: self.settings.batch_size]
        features, labels = (t[rows.to(t.device)] for t in (images.features, images.labels))
        rate = masks.drop_rate(own.anneal, work.round - 1, own.anneal_rounds)
        loss = self.loss(head.eval(), features, labels, work.received)
        head.mask = masks.exchanged(head.mask, head.ctx, loss, rate)
        return sent

    def send(self, state: ServerState, client_ids: Sequence[int], *, train: bool) -> Deliveries:
        """Return a client's own last prompt and its neighbours', with their masks, its own first.

        A newcomer starts from P^0, whose entries count as held. To be measured, as `merge` has it.
        """
        sent = super().send(state, client_ids, train=train)
        start = self.start().shared["ctx"]
        newcomer = {"ctx": start, "mask": torch.ones_like(start, dtype=torch.bool)}
        for i in client_ids if train else ():
            draws = self.generator("neighbours", i, state.round + 1)
            near = masks.near(i, state.pool, self.own.topology, self.own.num_neighbours, draws)
            own = state.pool.get(i, newcomer)
            state.lent[i] = [*near]
            sent[i] = masks.relayed([own, *(state.pool[j] for j in near)])
        return sent

    def merge(self, state: ServerState, uploads: Mapping[int, Upload]) -> None:
        """Keep each prompt and mask; what is measured as global is the mean of the round's."""
        state.pool |= {i: dict(upload.tensors) for i, upload in uploads.items()}
        state.shared["ctx"] = masks.mean(*masks.stacked([state.pool[i] for i in sorted(uploads)]))
