"""Classes with several names or descriptions: one prompt each, and what their features become.

Shapes: C classes, V names in all, M context tokens, D text width, d embedding width.
"""

import json
import tomllib
from collections.abc import Callable, Sequence
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
        features = self.each(ctx)
        return F.normalize(self._mean.to(features) @ features, dim=-1)

    def each(self, ctx: Tensor) -> Tensor:
        """Every name's own text features (..., V, d)."""
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
        return self.encoder(ctx)


class WeighedNames(NamesEncoder):
    """g(P) as the unit-norm sum of the names' text features t_v, by weights w that are learned:

        g^(c) = unit(SUM_v a_v t_v),  a = softmax of w over the names v of class c

    Args:
        names: what the names and their classes are.
        weights: gives w (V,); it is asked each time. With w = 0 this is the mean.
    """

    def __init__(self, names: NamesEncoder, weights: Callable[[], Tensor]) -> None:
        super().__init__(names.encoder, names.counts)
        self.weights = weights

    def __call__(self, ctx: Tensor) -> Tensor:
        """Text features (..., C, d), as `NamesEncoder` has them. Differentiable in w too."""
        features = self.each(ctx)
        own = self._mean.to(features.device) > 0
        shares = self.weights().masked_fill(~own, -torch.inf).softmax(dim=-1)  # (C, V)
        return F.normalize(shares.to(features) @ features, dim=-1)


class EachName(NamesEncoder):
    """g(P) of every name by itself: the class is chosen by its best name."""

    def __call__(self, ctx: Tensor) -> Tensor:
        """Text features (..., V, d) of contexts as `NamesEncoder` takes them."""
        return self.each(ctx)

    def largest(self, logits: Tensor) -> Tensor:
        """Return logits (..., C), each the largest of its names' logits (..., V)."""
        each = logits.split(self.counts, dim=-1)
        return torch.stack([own.amax(dim=-1) for own in each], dim=-1)


def read_names(path: str, classnames: Sequence[str], others: Sequence[str] = ()) -> Names:
    """Read a TOML or JSON file that gives classes a name or a list of names.

    A class that is not in it keeps its own name alone; without a path all do. The file may give
    names to `others` as well, classes that are not asked for.

    Raises UsageError that names the file and what is wrong in it.
    """
    given = _read(Path(path)) if path else {}
    for name in given:
        if name not in (*classnames, *others):
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
