"""SGPT (Deng et al., CVPR 2024, arXiv 2310.18285): a shared prompt, and groups' own chosen by keys.

An image chooses its group g by keys (see parts.keys). It is classified by the shared prompt and
the group's behind it. A round has two stages, and each moves what it is about:

    1  the shared prompt by the cross-entropy of the shared prompt alone
    2  groups' prompts and keys by that of shared and group, and by -mean cos(q, key_g)

The server takes means by n_i, those of keys by how often a client chose the group, and then goes
only a part of the way from its old groups and keys to the new.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pfedmoap_flwr.clip.features import Reading
from pfedmoap_flwr.methods.base import Deliveries, Method, Phase, ServerState, Tensors, Upload, Work
from pfedmoap_flwr.methods.parts.keyed import KeyedHead, KeyedImageHead
from pfedmoap_flwr.methods.parts.keys import average_keys, members
from pfedmoap_flwr.settings import Section, setting

KEYS, SHARE = "choice.keys", "choice.share"


class SGPTSettings(Section):
    """Settings of SGPT."""

    groups: int = setting(4, "groups G", low=1)
    tokens: int = setting(2, "tokens of a group's prompt", low=1)
    visual: int = setting(
        0, "tokens of a shared prompt inside the image tower; 0: prompts of text", low=0
    )
    together: bool = setting(False, "a training batch takes the group that most images chose")
    few: int = setting(50, "a group chosen so rarely in a round: plain mean of its keys", low=0)
    momentum: float = setting(0.5, "how much of old groups and keys is kept", low=0, high=1)


class SGPT(Method[SGPTSettings, KeyedHead]):
    """All that is learned travels; what a client says besides is how often it chose each group."""

    section = SGPTSettings
    fidelity = "nearest version: prompts of text, or before the first block of the image tower"

    @classmethod
    def reads(cls, own: SGPTSettings) -> Reading:
        """Return pixels for prompts inside the image tower."""
        return Reading("pixels" if own.visual else "features")

    def build(self) -> KeyedHead:
        """Return a fresh head of either form."""
        return KeyedImageHead(self) if self.own.visual else KeyedHead(self)

    def reports(self) -> dict[str, Tensor]:
        """Return `counts` (G,): a client's images in each group, once for each epoch."""
        return {"counts": torch.zeros(self.own.groups)}

    def schedule(self, head: KeyedHead, epochs: int) -> list[Phase]:
        """Return the two stages."""
        return [(epochs, ("ctx",)), (epochs, ("groups", KEYS))]

    def loss(self, head: KeyedHead, features: Tensor, labels: Tensor, received: Tensors) -> Tensor:
        """Return the sum of both stages' losses: the gradient of what moves is its stage's own."""
        groups, pull = head.choice.choose(head.raw(features), labels >= 0)
        joint = F.cross_entropy(head.joint(features, groups, head.encode()), labels)
        return F.cross_entropy(head.alone(features), labels) + joint + pull

    @torch.no_grad()
    def upload(self, work: Work[KeyedHead]) -> dict[str, Tensor]:
        """Return all prompts and keys, and the counts by the keys as trained."""
        head, images, counts = work.head, work.images, self.reports()["counts"]
        size, epochs = self.settings.batch_size, self.settings.local_epochs
        parts = zip(images.features.split(size), images.labels.split(size), strict=True)
        for batch, labels in parts:
            groups, _ = head.choice.choose(head.raw(batch), counted := labels >= 0)
            counts += epochs * members(groups, len(counts))[counted].sum(0).cpu()
        return super().upload(work) | {"counts": counts}

    def start(self) -> ServerState:
        """Return the state before round 1, with no image in any group."""
        state = super().start()
        state.extra["counts"] = torch.zeros(self.own.groups, dtype=torch.float64)
        return state

    def send(self, state: ServerState, client_ids: Sequence[int], *, train: bool) -> Deliveries:
        """Return what is shared, and each group's share of images; in round 1 all are alike."""
        counts, sent = state.extra["counts"], super().send(state, client_ids, train=train)
        share = counts / counts.sum() if counts.any() else torch.ones_like(counts)
        return {i: tensors | {SHARE: share.float()} for i, tensors in sent.items()}

    def merge(self, state: ServerState, uploads: Mapping[int, Upload]) -> None:
        """Average all, keys by counts; keep a part of the old groups and keys."""
        old, sent = state.shared, [upload.tensors for upload in uploads.values()]
        counts, keys = (torch.stack([t[name] for t in sent]) for name in ("counts", KEYS))
        new = self.combine(state, uploads) | {KEYS: average_keys(keys, counts, self.own.few)}
        kept = {name: new[name].lerp(old[name], self.own.momentum) for name in ("groups", KEYS)}
        state.shared = new | kept
        state.extra["counts"] = state.extra["counts"] + counts.sum(0)
