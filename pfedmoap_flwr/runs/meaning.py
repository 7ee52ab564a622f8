"""What a model's file says of itself, in its safetensors metadata: one JSON object.

So a file alone is enough to know what its numbers mean, on whatever machine it lies.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pfedmoap_flwr import config, methods
from pfedmoap_flwr.clip.load import FrozenClip, load_clip
from pfedmoap_flwr.clip.names import Names
from pfedmoap_flwr.config import Settings
from pfedmoap_flwr.data.federated import Task
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.base import Method
from pfedmoap_flwr.runs.folder import PLACES
from pfedmoap_flwr.settings import Value

T = TypeVar("T", str, int)
KEY = "pfedmoap"
"""Of the metadata; one text, for several entries would be written in an order of chance."""
FORMAT = 1
LEFT_OUT = (*PLACES, "data.path", "data.classnames")
"""Settings that say where something lay on the machine that made the file."""


@dataclass(frozen=True)
class Meaning:
    """What a personal model is.

    settings: all that decide numbers, flat. classnames: in the order of the model's outputs.
    template: the data set's sentence. held_out: classes that nobody trained. names: of each class,
    where setting prompt.names gives several. clip_digest: SHA-256 of CLIP's checkpoint file.
    owners: whose prompts were borrowed, nearest first; None where that is not known here.
    """

    settings: Mapping[str, Value]
    classnames: tuple[str, ...]
    template: str
    held_out: tuple[str, ...]
    names: Names | None
    clip_digest: str
    client: int
    round: int
    owners: tuple[int, ...] | None

    @classmethod
    def of(
        cls, method: Method[Any, Any], client: int, round: int, owners: tuple[int, ...] | None
    ) -> "Meaning":
        """Return what a client's model is that a method made."""
        settings, task = method.settings, method.task
        flat = {k: v for k, v in settings.flat().items() if k not in LEFT_OUT}
        return cls(
            settings=flat,
            classnames=task.classnames,
            template=task.template,
            held_out=task.held_out,
            names=method.names if settings.prompt.names else None,
            clip_digest=method.clip.checkpoint_digest,
            client=client,
            round=round,
            owners=owners,
        )

    @property
    def method_name(self) -> str:
        """Which method made the model."""
        return str(self.settings["method"])

    def metadata(self) -> dict[str, str]:
        """Return what safetensors writes into a file."""
        said = {
            "format": FORMAT,
            "method": self.method_name,
            "client": self.client,
            "round": self.round,
            "classnames": self.classnames,
            "held-out": self.held_out,
            "template": self.template,
            "names": self.names,
            "owners": self.owners,
            "clip": {
                "model": self.settings["clip.model"],
                "pretrained": self.settings["clip.pretrained"],
                "sha256": self.clip_digest,
            },
            "settings": dict(self.settings),
        }
        return {KEY: json.dumps(said)}

    @classmethod
    def read(cls, metadata: Mapping[str, str] | None) -> "Meaning":
        """Read a file's metadata. Raises ValueError for anything but what `metadata` returns."""
        text = (metadata or {}).get(KEY)
        if text is None:
            raise ValueError("was not written by pfedmoap: it does not say what it is")
        try:
            said = json.loads(text)
            if said["format"] != FORMAT:
                raise ValueError(f"has format {str(said['format'])[:20]}, not {FORMAT}")
            names, owners = said["names"], said["owners"]
            return cls(
                settings=_flat(said["settings"]),
                classnames=_texts(said["classnames"]),
                template=_one(said["template"], str),
                held_out=_texts(said["held-out"]),
                names=None if names is None else tuple(_texts(own) for own in names),
                clip_digest=_one(said["clip"]["sha256"], str),
                client=_one(said["client"], int),
                round=_one(said["round"], int),
                owners=None if owners is None else tuple(_one(i, int) for i in owners),
            )
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"says what it is in an unknown way ({error!r})") from error

    def method(self, weights: str, device: str) -> Method[Any, Any]:
        """Return the method that made the model, with CLIP loaded.

        weights: a checkpoint to use in place of the one that the settings name; "": that one.
        Raises UsageError where CLIP is not to be had or is another one.
        """
        changed = {"clip.pretrained": weights} if weights else {}
        settings = config.parse({**self.settings, **changed, "device": device})
        clip = load_clip(settings.clip, settings.device)
        self._check_clip(clip)
        return self._method(settings, clip)

    def _method(self, settings: Settings, clip: FrozenClip) -> Method[Any, Any]:
        task = Task(self.classnames, self.template, self.held_out)
        method = methods.make(settings.method, settings, settings.own, clip, task)
        if self.names is not None:
            if len(self.names) != len(self.classnames) or not all(self.names):
                raise ValueError("names other classes than it has")
            # The file that setting prompt.names names may not be on this machine
            method.names = self.names
        return method

    def _check_clip(self, clip: FrozenClip) -> None:
        if clip.checkpoint_digest != self.clip_digest:
            raise UsageError(
                f"made with other weights of {clip.name} than {clip.checkpoint} (SHA-256 "
                f"{self.clip_digest[:12]}..., here {clip.checkpoint_digest[:12]}...); give the "
                "right checkpoint with --weights FILE"
            )


def _flat(said: Any) -> dict[str, Value]:
    if not isinstance(said, dict) or not all(isinstance(value, Value) for value in said.values()):
        raise TypeError("settings are no flat table")
    return said


def _texts(said: Any) -> tuple[str, ...]:
    if not isinstance(said, list) or not all(isinstance(text, str) for text in said):
        raise TypeError("no list of texts")
    return tuple(said)


def _one(said: Any, kind: type[T]) -> T:
    if type(said) is not kind:
        raise TypeError(f"no {kind.__name__}")
    return said
