"""Scores on the way from a client to the server: measured there, read strictly here."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Context, MetricRecord, RecordDict
from torch import Tensor

from pfedmoap_flwr.config import EvalSettings
from pfedmoap_flwr.data.groups import GROUP
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.federation import strict
from pfedmoap_flwr.federation.strict import Refused
from pfedmoap_flwr.methods.base import Work
from pfedmoap_flwr.training import local
from pfedmoap_flwr.training.node import Node
from pfedmoap_flwr.training.scores import COUNTS, MOST_CLASSES, Asked, Scores, declared, score

MODELS = ("personal", "global")
RECORD = "scores"


def measure(
    node: Node,
    work: Work[Any],
    settings: EvalSettings,
    min_count: int,
    generator: torch.Generator,
    blank: Tensor | None,
) -> Scores:
    """Return the scores of a client's head on its own test images.

    min_count: the node's own; the larger one of it and the run's holds.
    """
    data = work.split("test")
    if not len(data):
        return {}
    asked = Asked(settings.names, max(min_count, settings.min_count), settings.bootstrap)
    with torch.no_grad():
        logits = local.classifier(work.head, blank)(data.features)
    return score(logits, data.labels, asked, generator, _groups(node, work.client_id))


def own_min_count(context: Context) -> int:
    """Return what a node's owner says with min-count, which no message can lower.

    Raises UsageError where it is no count.
    """
    said = context.node_config.get("min-count", 0)
    if type(said) is not int or said < 0:
        raise UsageError(f"min-count={said!r}: must be a whole number >= 0")
    return said


def _groups(node: Node, client_id: int) -> Tensor | None:
    """Return the number of each test image's group, or None where there are no groups."""
    images = node.federated.images.splits["test"]
    if GROUP not in images.column_names:
        return None
    names = np.asarray(images.with_format(None)[GROUP][:], dtype=str)
    rows = node.federated.clients[client_id].rows["test"]
    return torch.from_numpy(np.unique(names[rows], return_inverse=True)[1])


def to_record(scores: Mapping[str, Scores]) -> MetricRecord:
    """Return the record of a client's scores by model."""
    return MetricRecord(
        {f"{model}.{name}": value for model in scores for name, value in scores[model].items()}
    )


def check_scores(
    content: RecordDict, settings: EvalSettings, classes: int, images: int
) -> dict[str, Scores]:
    """Return a client's scores by model; a client without test images has none.

    classes: of the run; images: how many test images the client said it has.

    Raises Refused for another name, or a number out of its range.
    """
    if not images:
        return {}
    record = strict.record(content, RECORD, MetricRecord)
    ranges = declared(settings.names, classes)
    allowed = {f"{model}.{name}" for model in MODELS for name in (*ranges, *COUNTS, "confusion")}
    if odd := record.keys() - allowed:
        raise Refused(f"there is no score {strict.shown(sorted(odd)[0], 60)!r}")
    found: dict[str, Scores] = {}
    for model in MODELS:
        found[model] = {
            name: strict.number(record, f"{model}.{name}", low, high)
            for name, (low, high) in ranges.items()
            if f"{model}.{name}" in record
        }
        for name in COUNTS:
            if f"{model}.{name}" in record:
                found[model][name] = strict.whole(record, f"{model}.{name}", 0, classes)
        name = f"{model}.confusion"
        if name in record and classes <= MOST_CLASSES:
            found[model]["confusion"] = strict.wholes(record, name, classes**2, images)
    return found
