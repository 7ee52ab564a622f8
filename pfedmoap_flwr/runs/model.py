"""A client's personal model: used on images, kept as a safetensors file that says what it is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import datasets
import torch
from PIL.Image import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pfedmoap_flwr import files
from pfedmoap_flwr.clip.features import Dtype, read_once
from pfedmoap_flwr.data.pixels import read_window
from pfedmoap_flwr.data.sources.scan import scan
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.base import Head, Method, Split, Work
from pfedmoap_flwr.runs import insight
from pfedmoap_flwr.runs.meaning import Meaning
from pfedmoap_flwr.training import local
from pfedmoap_flwr.training.exchange import make_work

if TYPE_CHECKING:
    import pandas as pd

MOST_BYTES = 2**33
"""Of a file: far beyond any head, and below what would fill a machine's memory."""


@dataclass(frozen=True, eq=False)
class Model:
    """A client's personal model, just as a run measures it.

    meaning: what it is and what made it. method: with CLIP. head: adapted; never trained further.
    """

    meaning: Meaning
    method: Method[Any, Any]
    head: Head

    @classmethod
    def of_work(
        cls, method: Method[Any, Any], work: Work[Any], owners: Sequence[int] | None = None
    ) -> "Model":
        """Return the model of a client whose head is adapted already."""
        said = None if owners is None else tuple(owners)
        meaning = Meaning.of(method, work.client_id, work.round, said)
        return cls(meaning, method, work.head.eval())

    @classmethod
    def open(cls, path: Path, weights: str = "", device: str = "auto") -> "Model":
        """Read a file that `save` wrote, on any machine. Nothing is unpickled.

        weights: CLIP's checkpoint, where it lies elsewhere than the file says.
        Raises UsageError naming the file where it is another one, or damaged, or CLIP is not here.
        """
        try:
            meaning, tensors = _read(path)
            return cls._built(meaning, tensors, meaning.method(weights, device))
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from error
        except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            said = " ".join(str(reason or type(error).__name__).split())
            raise UsageError(f"{path}: is no model that pfedmoap can use ({said[:200]})") from error

    @classmethod
    def _built(
        cls, meaning: Meaning, tensors: Mapping[str, Tensor], method: Method[Any, Any]
    ) -> "Model":
        _check(tensors, method.build())
        # What a client's images gave is in the tensors already
        empty = Split(torch.empty(0), torch.empty(0, dtype=torch.long))
        work = make_work(method, meaning.client, meaning.round, lambda name: empty, {}, tensors)
        return cls(meaning, method, work.head.eval())

    def save(self, path: Path) -> None:
        """Write the model whole or not at all. Raises OSError."""
        tensors = {name: t.detach().cpu().contiguous().clone() for name, t in _all(self.head)}
        files.replace(path, save(tensors, metadata=self.meaning.metadata()))

    @property
    def classnames(self) -> tuple[str, ...]:
        """What the outputs stand for, in their order."""
        return self.meaning.classnames

    def read(self, images: Sequence[Any]) -> Tensor:
        """Return what the model reads of images, (n, ...), as a run reads them.

        images: paths, or Pillow's images. Raises UsageError naming one that cannot be read.
        """
        table = _table(images)
        broken = scan(table).broken if len(table) else {}
        for name, reason in broken.values():
            raise UsageError(f"image {name}: {reason}")
        kind = type(self.method).reads(self.method.own).kind
        dtype = cast(Dtype, self.meaning.settings["clip.features-dtype"])
        window = read_window(str(self.meaning.settings["data.window"]))
        return read_once(self.method.clip, table, kind, dtype, window)

    @cached_property
    def _logits(self) -> Any:
        return local.classifier(self.head, local.blank_for(self.method))

    def probabilities(self, images: Sequence[Any]) -> Tensor:
        """Return the probability of each class (n, C) for images; see `read`."""
        if not len(images):
            return torch.empty(0, len(self.classnames))
        logits: Tensor = self._logits(self.read(images))
        if logits.isnan().any():
            raise UsageError("the model's logits are not finite")
        return logits.double().softmax(dim=-1).cpu()

    def predict(self, images: Sequence[Any]) -> "pd.DataFrame":
        """Return a row per image: `predicted`, `probability`, and each class's `p(CLASS)`.

        images: paths, or Pillow's images. A method that measures images as a stream (fedmp)
        classifies each by those before it.
        """
        import pandas as pd

        found = self.probabilities(images)
        columns = [f"p({name})" for name in self.classnames]
        table = pd.DataFrame(found.numpy(), pd.Index(_named(images), name="image"), columns)
        table.insert(0, "predicted", [self.classnames[i] for i in found.argmax(dim=1)])
        table.insert(1, "probability", found.amax(dim=1).numpy() if len(found) else [])
        return table

    def attention(
        self, images: Sequence[Any], by: Literal["image", "class"] = "image"
    ) -> "pd.DataFrame":
        """Return whom the gate listens to: a row per image, or class, a column per expert.

        The client's own prompt is the first column; a row sums to 1. Mean over the gate's heads,
        and over classes, or images. Raises UsageError for a model without a gate, or experts.
        """
        import pandas as pd

        found = insight.attention(self, self.read(images))
        whose = insight.owner_names(self, found.shape[1])
        if by == "class":
            index = pd.Index(self.classnames, name="class")
            return pd.DataFrame(found.mean(dim=0).T.cpu().numpy(), index, whose)
        index = pd.Index(_named(images), name="image")
        return pd.DataFrame(found.mean(dim=2).cpu().numpy(), index, whose)

    def words(self, k: int = 5) -> "pd.DataFrame":
        """Return the k words nearest to each vector of the model's prompts, a row per word.

        Columns: those of `insight.NearWord`. Raises UsageError where there are no such vectors.
        """
        import pandas as pd

        return pd.DataFrame(insight.near_words(self, k))


def _named(images: Sequence[Any]) -> list[str | int]:
    """Return a name for each image: its path, or else its number."""
    return [str(i) if isinstance(i, str | Path) else number for number, i in enumerate(images)]


def _all(head: Head) -> list[tuple[str, Tensor]]:
    """Return parameters and buffers; of these too what a client computes anew in every round."""
    return [*head.named_parameters(), *head.named_buffers()]


def _read(path: Path) -> tuple[Meaning, dict[str, Tensor]]:
    if not path.is_file():
        raise UsageError("no such file")
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"has more than {MOST_BYTES} bytes")
    with safe_open(path, framework="pt") as file:
        meaning = Meaning.read(file.metadata())
        return meaning, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _check(tensors: Mapping[str, Tensor], like: Head) -> None:
    """Raise ValueError where these are not all tensors of such a head.

    A buffer may have any shape, for it may be of a client's own images; none is NaN.
    """
    parameters = dict(like.named_parameters())
    known = {
        f"{path}.{leaf}" if path else leaf
        for path, module in like.named_modules()
        for leaf in (*module._parameters, *module._buffers)
    }
    missing = parameters.keys() | {name for name, _ in like.named_buffers()}
    if tensors.keys() - known or missing - tensors.keys():
        raise ValueError(f"holds {sorted(tensors)}, not {sorted(missing)}")
    for name, tensor in tensors.items():
        own = parameters.get(name)
        if own is not None and (own.shape, own.dtype) != (tensor.shape, tensor.dtype):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {tuple(own.shape)}")
        if tensor.is_floating_point() and tensor.isnan().any():
            raise ValueError(f"{name} is not a number")


def _table(images: Sequence[Any]) -> datasets.Dataset:
    """Return a table of images that are decoded when they are read, as a run's are."""
    given = [image if isinstance(image, Image) else str(image) for image in images]
    features = datasets.Features({"image": datasets.Image()})
    return datasets.Dataset.from_dict({"image": given}, features=features)
