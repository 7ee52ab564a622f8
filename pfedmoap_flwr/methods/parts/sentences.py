"""Which of several sentences for a class are to be trusted (TOFA, AAAI 2026, arXiv 2511.16423)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from pfedmoap_flwr.clip.load import FrozenClip
from pfedmoap_flwr.data.federated import Task

SENTENCES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
"""The seven that OpenAI found to be best together for ImageNet (CLIP's public notebook)."""


def texts_of(clip: FrozenClip, task: Task) -> Tensor:
    """Return text features (T, C, d): of the data set's sentence t^0 and of SENTENCES."""
    sentences = (task.template, *SENTENCES)
    return torch.stack([clip.zeroshot(task.classnames, sentence) for sentence in sentences])


def sentence_scores(images: Tensor, labels: Tensor, texts: Tensor, logit_scale: float) -> Tensor:
    """Return u(t^0) log(u(t^m) / u(t^0)) (T, C) of unit-norm images (n, d), texts (T, C, d).

    u(t) (C,) is the mean probability of class c over the images of c where t is the text of c and
    t^0 that of every other class. 0 for a class without images.
    """
    n_classes = texts.shape[1]
    member = F.one_hot(labels, n_classes).to(images)
    plain = logit_scale * images @ texts[0].t()
    others = plain.masked_fill(member.bool(), -torch.inf).logsumexp(-1)
    own = logit_scale * torch.einsum("nd,tnd->tn", images, texts[:, labels])
    u = torch.sigmoid(own - others) @ member / member.sum(0).clamp_min(1)
    tiny = torch.finfo(u.dtype).tiny
    return u[0] * (u.clamp_min(tiny) / u[0].clamp_min(tiny)).log()


def mixed_texts(texts: Tensor, scores: Tensor, best: int) -> Tensor:
    """Return text features (C, d) of unit length: those of the `best` scores, by their softmax.

    texts (T, C, d), scores (T, C).
    """
    chosen = scores.topk(best, dim=0)
    weights = torch.zeros_like(scores).scatter(0, chosen.indices, chosen.values.softmax(0))
    return F.normalize(torch.einsum("mc,mcd->cd", weights, texts), dim=-1)
