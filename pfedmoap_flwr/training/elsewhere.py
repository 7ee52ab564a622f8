"""The common model measured on data sets that no client holds."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from pfedmoap_flwr.clip.features import Dtype, Reading
from pfedmoap_flwr.data.federated import Federated, Task
from pfedmoap_flwr.data.images import load_images
from pfedmoap_flwr.data.settings import ImageSettings
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.base import Method, Split
from pfedmoap_flwr.training import local
from pfedmoap_flwr.training.exchange import make_work
from pfedmoap_flwr.training.node import Node
from pfedmoap_flwr.training.open_classes import OtherClasses

logger = logging.getLogger("flwr.pfedmoap")


class OtherSet:
    """A data set with classes of its own; where a method is tied to classes, zero-shot alone.

    Args:
        name, path: as data.name and data.path have them.
        reading: what the method's head gets of an image.
        split: "test" or "validation", whose images are measured.

    Raises:
        UsageError: the data set is not to be had.
    """

    def __init__(
        self,
        method: Method[Any, Any],
        name: str,
        path: str,
        reading: Reading,
        dtype: Dtype,
        split: str,
    ) -> None:
        try:
            images = load_images(ImageSettings(name=name, path=path))
        except UsageError as error:
            raise UsageError(f"setting eval.on, {name}: {error}") from error
        # The trained classes are known to a file of several names, which may name them
        task = Task(images.classnames, images.template, method.task.all_classnames)
        self.name, self.split, self.method = name, split, method
        self.node = Node(method.clip, Federated(images, {}, task), reading, dtype)
        self.heads: OtherClasses | None = None
        try:
            self.heads = OtherClasses(method, task)
        except (ValueError, UsageError) as error:
            logger.warning("no accuracy on %s: %s", name, error)

    def measure(self, sent: Mapping[int, Mapping[str, Tensor]], round: int) -> dict[str, float]:
        """Return {"global": accuracy, "zeroshot": accuracy}; what has no images has none.

        sent: what each client is sent to be measured. Those that are sent the same count once; of
        others the mean is taken.
        """
        images = self._images(self.node)
        plain = self._images(self.node.reading_as(Reading("features")))
        task = self.node.federated.task
        found = local.zeroshot_accuracies(self.method.clip, task, {"zeroshot": plain})
        if self.heads is None or not len(images):
            return found
        blank = local.blank_for(self.method)
        none = Split(images.features[:0], images.labels[:0])
        kinds: dict[tuple[tuple[str, bytes], ...], list[int]] = {}
        for client_id, tensors in sent.items():
            said = tuple((name, t.numpy(force=True).tobytes()) for name, t in tensors.items())
            kinds.setdefault(said, []).append(client_id)
        total = 0.0
        for clients in kinds.values():
            received = sent[clients[0]]
            work = make_work(self.method, clients[0], round, lambda _: none, received, received)
            head = self.heads.work(work).head
            total += len(clients) * local.accuracies(head, {"global": images}, blank)["global"]
        return {"global": total / len(sent), **found}

    def _images(self, node: Node) -> Split:
        return node.rows_of(self.split, np.arange(len(node.federated.images.splits[self.split])))
