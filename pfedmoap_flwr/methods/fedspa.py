"""FedSPA (ICML 2026): visual prototypes at the clients, semantic ones at the server.

A client trains K (C, d), one visual prototype for each class, on unit-norm image features x:

    logit^(c) = logit_scale cos(x, T_c) + alpha exp(-beta (1 - x . K_c))

The server trains the text features T on the K_i of all clients (see `parts/alignment.py`), starting
from zero-shot CLIP's. Every K_i starts from the mean image feature of each class over all clients.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import ParamsT

from pfedmoap_flwr.methods.base import Deliveries, Head, Method, ServerState, Tensors, Upload, Work
from pfedmoap_flwr.methods.parts.alignment import affinity, align
from pfedmoap_flwr.methods.parts.moments import counted_means, pooled_means
from pfedmoap_flwr.methods.parts.schedules import cosine
from pfedmoap_flwr.settings import Section, setting


class FedSPASettings(Section):
    """Settings of FedSPA; the first three differ from data set to data set."""

    alpha: float = setting(6.0, "weight of the visual prototypes", low=0)
    beta: float = setting(3.0, "sharpness of the visual prototypes", above=0)
    lr: float = setting(6e-4, "learning rate of clients and server (AdamW)", above=0)
    server_epochs: int = setting(100, "epochs of the server in a round", low=0)
    pull: float = setting(0.2, "weight of the text features' pull towards CLIP's", low=0)


class FedSPAHead(Head):
    """Visual prototypes (C, d), 0 as long as there are none, and text features (C, d)."""

    text_features: Tensor

    def __init__(self, method: "FedSPA") -> None:
        super().__init__(method)
        self.alpha, self.beta = method.own.alpha, method.own.beta
        self.logit_scale = method.clip.logit_scale
        text_features = method.clip.zeroshot(method.task.classnames, method.task.template)
        self.register_buffer("text_features", text_features.clone())
        self.prototypes = nn.Parameter(torch.zeros_like(text_features))

    def encode(self) -> Tensor:
        """Return the text features (C, d)."""
        return self.text_features

    def classify(self, image_features: Tensor, encoded: Tensor) -> Tensor:
        """Return logits (B, C) of image features (B, d)."""
        x = F.normalize(image_features, dim=-1)
        visual = self.alpha * affinity(x, self.prototypes, self.beta)
        return self.logit_scale * (x @ encoded.t()) + visual


class FedSPA(Method[FedSPASettings, FedSPAHead]):
    """Round 1 collects class means; from round 2 on a client's K is its own."""

    section = FedSPASettings
    head = FedSPAHead

    def reports(self) -> dict[str, Tensor]:
        """Return `counts` (C,): how many training images of each class a client has."""
        return {"counts": torch.zeros(len(self.task.classnames))}

    def lr(self, name: str, epoch: int, epochs: int) -> float:
        """Return a rate that falls in a cosine over the local epochs."""
        return cosine(self.own.lr, epoch, epochs)

    def optimizer(self, work: Work[FedSPAHead], groups: ParamsT) -> torch.optim.Optimizer:
        """Return AdamW, fresh in every round."""
        return torch.optim.AdamW(groups, eps=1e-4)

    def upload(self, work: Work[FedSPAHead]) -> dict[str, Tensor]:
        """Return the counts and K, which is the client's class means in round 1."""
        x, labels = F.normalize(work.images.features, dim=-1), work.images.labels
        sent = counted_means(x, labels, len(self.task.classnames))
        return sent if work.round == 1 else sent | self.shared(work.head)

    def expected(self, state: ServerState, sent: Tensors) -> dict[str, Tensor]:
        """Return the counts and K, which goes up whether or not it came down."""
        return state.shared | self.reports()

    def send(self, state: ServerState, client_ids: Sequence[int], *, train: bool) -> Deliveries:
        """Return T, and the pooled class means to a client that has no K of its own."""
        own = state.pool if train else {}
        return {i: state.extra | ({} if i in own else state.shared) for i in client_ids}

    def merge(self, state: ServerState, uploads: Mapping[int, Upload]) -> None:
        """Pool the class means of round 1; later keep every K and train T on them."""
        if state.round == 0:
            state.shared["prototypes"] = pooled_means([u.tensors for u in uploads.values()]).float()
            return
        state.pool |= {i: {"prototypes": u.tensors["prototypes"]} for i, u in uploads.items()}
        prototypes = [state.pool[i]["prototypes"] for i in sorted(state.pool)]
        draws = [self.generator("align", i, state.round + 1) for i in sorted(state.pool)]
        own, anchors = self.own, self.build().text_features.cpu()
        before = state.extra.get("text_features", anchors)
        after = align(before, anchors, prototypes, draws, own.server_epochs, own.lr, own.pull)
        state.extra["text_features"] = after
