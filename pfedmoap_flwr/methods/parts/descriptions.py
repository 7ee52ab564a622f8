"""What a class looks like: a sentence for each, and prompts and patches that are held to it.

DuAl-PT (arXiv 2309.04158) has a language model describe the classes.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from torch.nn import functional as F

from pfedmoap_flwr.assets import asset
from pfedmoap_flwr.clip.load import FrozenClip
from pfedmoap_flwr.data.federated import Task
from pfedmoap_flwr.errors import UsageError

BUNDLED = "descriptions/emoji-domains.json"
TEMPERATURE = 0.1
logger = logging.getLogger("flwr.pfedmoap")


def describe(clip: FrozenClip, task: Task, named: str, key: str) -> Tensor:
    """Return text features (C, d), unit-norm, of a sentence for each class.

    From the file `named`, the value of setting `key`. Without one: those written for the bundled
    data set, where the classes are its own; else the task's sentence with the class name, and a
    warning says so.

    Raises UsageError for a file that is missing, is no {class: sentence} in JSON, lacks a class, or
    has a sentence that is too long for the model.
    """
    what = f"setting {key}={named!r}" if named else BUNDLED
    known = _read(Path(named).expanduser() if named else asset(BUNDLED), what)
    missing = [name for name in task.classnames if _plain(name) not in known]
    if not missing:
        sentences = tuple(known[_plain(name)] for name in task.classnames)
    elif named:
        raise UsageError(f"{what}: has no sentence for class {missing[0]!r}")
    else:
        logger.warning(
            "no descriptions of these classes are bundled: each is described by %r; %s names a "
            "file of better ones",
            task.template,
            key,
        )
        return clip.zeroshot(task.classnames, task.template)
    try:
        return clip.zeroshot(sentences, "{}")
    except ValueError as error:
        raise UsageError(f"{what}: {error}") from error


def _read(path: Path, what: str) -> dict[str, str]:
    """Return the sentences of a file by plain class name."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{what}: cannot be read as JSON: {error}") from error
    if not isinstance(said, Mapping) or not all(isinstance(text, str) for text in said.values()):
        raise UsageError(f'{what}: must be {{"class name": "sentence", ...}} in JSON')
    return {_plain(name): text for name, text in said.items()}


def _plain(name: str) -> str:
    return name.replace("_", " ").casefold().strip()


def distance_to_descriptions(texts: Tensor, described: Tensor) -> Tensor:
    """Return mean_c (1 - T_c . D_c) () of unit-norm text features T, D (C, d)."""
    return (1 - (texts * described).sum(-1)).mean()


def distance_to_patches(patches: Tensor, texts: Tensor, labels: Tensor) -> Tensor:
    """Return mean_b SUM_m A_bm (1 - x_bm . T_y) (), A = softmax over m of x_bm . T_y / 0.1.

    Patches x (B, M, d) get unit norm here, texts T (C, d) have it; y = labels (B,). An image with a
    label below 0 does not count.
    """
    own = texts[labels.clamp_min(0)]
    near = (F.normalize(patches, dim=-1) * own[:, None]).sum(-1)
    distances = ((near / TEMPERATURE).softmax(-1) * (1 - near)).sum(-1)
    counted = labels >= 0
    return (distances * counted).sum() / counted.sum()
