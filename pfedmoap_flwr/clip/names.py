"""Classes with several names or descriptions: one prompt each, and the mean of their features.

Shapes: C classes, V names in all, M context tokens, D text width, d embedding width.
"""

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pfedmoap_flwr.clip.text import PromptEncoder
from pfedmoap_flwr.errors import UsageError

Names = tuple[tuple[str, ...], ...]
"""The names of each class, in label order."""


class NamesEncoder:
    """g(P) of classes with several names: the unit-norm mean of the names' text features.

    That is how CLIP combines several sentences of a class (arXiv 2103.00020, section 3.1.4).

    Args:
        encoder: of all V names, those of the first class first.
        counts: (C,) how many names each class has.

    Attributes:
        template, n_ctx, width, embed_dim: as the encoder's.
    """

    def __init__(self, encoder: PromptEncoder, counts: Sequence[int]) -> None:
        self.encoder = encoder
        self.counts = tuple(counts)
        self.template, self.n_ctx = encoder.template, encoder.n_ctx
        self.width, self.embed_dim = encoder.width, encoder.embed_dim
        owner = torch.arange(len(self.counts)).repeat_interleave(torch.tensor(self.counts))
        one = F.one_hot(owner).T.float()
        self._mean = one / one.sum(dim=1, keepdim=True)  # (C, V)

    def __call__(self, ctx: Tensor) -> Tensor:
        """Text features (..., C, d) of contexts (..., M, D), or (..., C, M, D) if class-specific.

        The names of a class share its context. Differentiable in `ctx`.
        """
        if self.encoder.class_specific:
            # Not by indices: where several threads add to one gradient, their order would show
            each = ctx.split(1, dim=-3)
            ctx = torch.cat(
                [
                    own.expand(*own.shape[:-3], n, -1, -1)
                    for own, n in zip(each, self.counts, strict=True)
                ],
                dim=-3,
            )
        features = self.encoder(ctx)
        return F.normalize(self._mean.to(features) @ features, dim=-1)


def read_names(path: str, classnames: Sequence[str]) -> Names:
    """Read a TOML or JSON file that gives classes a name or a list of names.

    A class that is not in it keeps its own name alone; without a path all do.

    Raises UsageError that names the file and what is wrong in it.
    """
    given = _read(Path(path)) if path else {}
    for name in given:
        if name not in classnames:
            known = ", ".join(classnames[:5])
            raise UsageError(f"prompt.names={path}: there is no class '{name}' (but {known} ...)")
    names = []
    for classname in classnames:
        said = given.get(classname, classname)
        own = [said] if isinstance(said, str) else said
        right = isinstance(own, list) and all(isinstance(n, str) and n.strip() for n in own)
        if not own or not right:
            raise UsageError(f"prompt.names={path}: '{classname}' is no name and no list of names")
        names.append(tuple(own))
    return tuple(names)


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise UsageError(f"prompt.names={path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UsageError(f"prompt.names={path}: neither TOML nor .json ({error})") from error
    if not isinstance(found, dict):
        raise UsageError(f"prompt.names={path}: not a table of classes")
    return found
