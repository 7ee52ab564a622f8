"""TOFA (Zhang et al., AAAI 2026, arXiv 2511.16423): one round, two modalities, no training.

Visual: unit-norm image features x of class c are N(mu_c, S). A client's posterior has its own
likelihood and that of all clients to the power alpha, so statistics add up (`parts/gaussian.py`):

    N_c = N_c^own + alpha N_c^all, likewise SUM_c x and SUM x x'
    f_V^(c) = log N_c / N + mu_c' S^-1 x - mu_c' S^-1 mu_c / 2

Text: of several sentences t^m for a class, those are kept that all clients' images agree on. With
u_k(t) = the mean probability of class c over client k's images of c, where t is its text,

    r(t^m) = mean_k u_k(t^0) log(u_k(t^m) / u_k(t^0)); f_T = logit_scale cos(x, the best t)

Both: f = eta f_V + (1 - eta) f_T, eta = p_V / (p_V + p_T), p = max softmax f.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pfedmoap_flwr.methods.base import Deliveries, Head, Method, ServerState, Upload, Work
from pfedmoap_flwr.methods.parts.fusion import surer
from pfedmoap_flwr.methods.parts.gaussian import STATISTICS, add_once, fit_posterior, powered
from pfedmoap_flwr.methods.parts.moments import statistics
from pfedmoap_flwr.methods.parts.sentences import SENTENCES, mixed_texts, sentence_scores, texts_of
from pfedmoap_flwr.settings import Section, setting


class TOFASettings(Section):
    """Settings of TOFA."""

    alpha: float = setting(0.1, "power of all clients' images beside a client's own", above=0)
    prior: float = setting(1.0, "strength of the covariance's prior, in d images", above=0)
    best: int = setting(3, "sentences kept for a class", low=1, high=1 + len(SENTENCES))


class TOFAHead(Head):
    """Two classifiers in buffers, none of which is kept; zero-shot CLIP before they came."""

    weight: Tensor
    bias: Tensor
    text_features: Tensor

    def __init__(self, method: "TOFA") -> None:
        super().__init__(method)
        self.logit_scale = method.clip.logit_scale
        text = method.clip.zeroshot(method.task.classnames, method.task.template)
        start = {"weight": torch.zeros_like(text), "bias": torch.zeros_like(text[:, 0])}
        for name, tensor in (start | {"text_features": text.clone()}).items():
            self.register_buffer(name, tensor, persistent=False)

    def encode(self) -> Tensor:
        """Return the text features (C, d)."""
        return self.text_features

    def classify(self, image_features: Tensor, encoded: Tensor) -> Tensor:
        """Return logits (B, C) of image features (B, d)."""
        x = F.normalize(image_features, dim=-1)
        visual, text = x @ self.weight.t() + self.bias, self.logit_scale * (x @ encoded.t())
        return surer(visual, text)


class TOFA(Method[TOFASettings, TOFAHead]):
    """Statistics and scores up; their sums down, which each client mixes with its own."""

    section = TOFASettings
    head = TOFAHead
    fidelity = "nearest version: fixed sentences in place of a language model's"

    def reports(self) -> dict[str, Tensor]:
        """Return what a client without images sends."""
        width = self.build().weight.shape[1]
        return self.statistics(torch.zeros(0, width), torch.zeros(0, dtype=torch.long))

    def statistics(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return counts (C,), sums (C, d), moments (d, d) and the sentences' scores (T, C)."""
        x, texts = F.normalize(features, dim=-1), texts_of(self.clip, self.task).to(features)
        scores = sentence_scores(x, labels, texts, self.clip.logit_scale)
        return statistics(x, labels, texts.shape[1], "lda") | {"scores": scores.cpu()}

    def upload(self, work: Work[TOFAHead]) -> dict[str, Tensor]:
        """Return the statistics of the client's training images."""
        return self.statistics(work.images.features, work.images.labels)

    def prepare(self, work: Work[TOFAHead]) -> None:
        """Fit the classifier of all clients to what came."""
        if "counts" in work.received:
            work.head.load(fit_posterior(work.received, self.own.prior))

    def adapt(self, work: Work[TOFAHead]) -> None:
        """Fit the client's own: its statistics, and those of all to the power alpha."""
        came = work.received
        if "counts" in came:
            mixed = powered(self.upload(work), came, self.own.alpha)
            work.head.load({**came, **fit_posterior(mixed, self.own.prior)})

    def send(self, state: ServerState, client_ids: Sequence[int], *, train: bool) -> Deliveries:
        """Return the sums of all statistics and the text features, once there are any."""
        names = [name for name in (*STATISTICS, "text_features") if name in state.extra]
        return {i: {name: state.extra[name].float() for name in names} for i in client_ids}

    def merge(self, state: ServerState, uploads: Mapping[int, Upload]) -> None:
        """Add the statistics of clients that are new, and choose the sentences."""
        add_once(state, uploads)
        scores = state.extra["scores"].float() / len(state.pool)
        texts = texts_of(self.clip, self.task).cpu()
        state.extra["text_features"] = mixed_texts(texts, scores, self.own.best)
