"""Methods, works and whole federations in one process, and what a run left behind."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message
from torch import Tensor

from pfedmoap_flwr import config, methods
from pfedmoap_flwr.clip.load import load_clip
from pfedmoap_flwr.data.federated import Task, federated
from pfedmoap_flwr.data.images import forget_images
from pfedmoap_flwr.engines.in_process import (
    FIRST_NODE_ID,
    InProcessGrid,
    Workers,
    make_context,
    run_in_process,
    serve_in_process,
)
from pfedmoap_flwr.federation import messages
from pfedmoap_flwr.federation.client import forget_runs
from pfedmoap_flwr.methods.base import Head, Method, Split, Work
from pfedmoap_flwr.runs.folder import RunFolder
from pfedmoap_flwr.runs.heads import KeptHeads
from pfedmoap_flwr.settings import Value
from support.tiny import CLASSNAMES, TINY

Federate = Callable[..., RunFolder]
"""The fixture `federate`: a run's name and its changes to the tiny settings -> its folder."""
Federation = Callable[..., RunFolder]
"""The fixture `federation`: the folders of nodes and settings -> the folder of their run."""


def forget_data() -> None:
    """Let data sets be loaded, divided and read anew, as in a fresh process."""
    forget_images()
    federated.cache_clear()
    forget_runs()


def make_method(name: str, **changes: Any) -> Any:
    """A method with the tiny settings, the tiny CLIP and the tiny data set's classes."""
    changes = {k if "." in k else k.replace("_", "-"): v for k, v in changes.items()}
    settings = config.parse({**TINY, "method": name, **changes})
    clip = load_clip(settings.clip, "cpu")
    task = Task(tuple(CLASSNAMES), "a drawing of {}.")
    return methods.make(name, settings, settings.own, clip, task)


def make_work(
    method: Method[Any, Any],
    head: Head,
    images: Split | None = None,
    received: Mapping[str, Tensor] | None = None,
    client_id: int = 0,
    server_round: int = 1,
) -> Work[Any]:
    """What lies before a client that has these training images alone."""
    images = images or Split(torch.zeros(0, 64), torch.zeros(0, dtype=torch.long))
    work = Work(client_id, server_round, head, lambda name: images, received or {})
    method.prepare(work)
    return work


def run_tiny(folder: Path, **changes: Any) -> RunFolder:
    """Run a tiny federation in process; `changes` are flat settings with "_" for "-"."""
    flat = {**TINY, "run-dir": str(folder), "state-dir": str(folder / "clients")}
    flat |= changes.pop("flat", {})
    flat |= {k if "." in k else k.replace("_", "-"): v for k, v in changes.items()}
    run_in_process(config.parse(flat))
    return RunFolder(folder)


def own_context(number: int, folder: Path, flat: Mapping[str, Any]) -> Context:
    """Return what Flower gives a client that has a folder of its own."""
    node: dict[str, Value] = {"partition-id": number, "num-partitions": 9, "data-dir": str(folder)}
    return make_context(FIRST_NODE_ID + number, node, config.parse(dict(flat)).flat())


def run_folders(
    run_dir: Path, dirs: Sequence[Path], grid: type[InProcessGrid] = InProcessGrid, **flat: Any
) -> RunFolder:
    """Run nodes in process that each have a folder; the run folder says what came of it."""
    settings = {**TINY, "num-server-rounds": 1, "local-epochs": 1, **flat}
    settings |= {"data.num-clients": len(dirs), "run-dir": str(run_dir)}
    settings |= {"state-dir": str(run_dir / "clients")}
    contexts = {FIRST_NODE_ID + i: own_context(i, path, settings) for i, path in enumerate(dirs)}
    parsed = config.parse(settings)
    serve_in_process(grid(Workers(parsed), contexts), parsed.flat())
    return RunFolder(run_dir)


@dataclass(frozen=True, eq=False)
class Recorded:
    """A run and all that travelled in it."""

    run: RunFolder
    wire: list["Exchange"]


@dataclass(frozen=True, eq=False)
class Exchange:
    """A message, its answer, and copies of the arrays that went down and up."""

    kind: str
    round: int
    client: int
    down: dict[str, Tensor]
    up: dict[str, Tensor]
    message: Message
    reply: Message


def recording(exchanges: list[Exchange]) -> type[InProcessGrid]:
    """A grid that writes down all that travels after the introductions, in order."""

    class RecordingGrid(InProcessGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            messages = list(messages)
            ids = list(super().push_messages(messages))
            exchanges.extend(
                _exchange(message, self.replies[message_id])
                for message, message_id in zip(messages, ids, strict=True)
                if "arrays" in message.content
            )
            return ids

    return RecordingGrid


def _exchange(message: Message, reply: Message) -> Exchange:
    up = reply.content.get("arrays") if reply.has_content() else None
    return Exchange(
        kind=message.metadata.message_type,
        round=int(message.content["config"]["round"]),
        client=message.metadata.dst_node_id - FIRST_NODE_ID,
        down=messages.to_tensors(message.content["arrays"]),
        up={} if up is None else messages.to_tensors(up),
        message=message,
        reply=reply,
    )


def kept_head(run: RunFolder, client_id: int, after: int = 1000) -> dict[str, Tensor]:
    """Return the head that a client kept after a round, or after its last one."""
    (folder,) = run.path.rglob(f"client-{client_id}")
    return KeptHeads(folder).load(before=after + 1) or {}


def right_images(run: RunFolder) -> dict[tuple[int, int, str], int]:
    """Return how many images each accuracy counted, by (round, client, metric).

    Rounding may move an image across the border between two classes; so compare with abs=1 where
    two runs are not bitwise equal.
    """
    rows = {row["client"]: row for row in run.clients()}
    return {
        (record.round, client_id, name): round(
            value * rows[client_id]["validation" if "validation" in name else "test"]
        )
        for record in run.rounds()
        for client_id, metrics in record.clients.items()
        for name, value in metrics.items()
    }


def rounds(run: RunFolder) -> list[dict[str, Any]]:
    """Return what rounds.jsonl says, apart from the time it took."""
    return [{**asdict(record), "seconds": None, "memory": None} for record in run.rounds()]


def tensor_files(run: RunFolder) -> dict[str, bytes]:
    """Return the checkpoint and every kept head, byte for byte; a run's id is its own."""
    return {
        str(path.relative_to(run.path)).replace(run.run_id, "RUN"): content(path, run)
        for path in sorted(run.path.rglob("*.safetensors"))
    }


def content(path: Path, run: RunFolder) -> bytes:
    """Return what a file holds, with RUN in the place of the run's id."""
    return path.read_bytes().replace(run.run_id.encode(), b"RUN")


def assert_same(run: RunFolder, other: RunFolder) -> None:
    """Two runs left the same bytes and the same numbers."""
    assert rounds(run) == rounds(other)
    assert tensor_files(run) == tensor_files(other)
    assert (run.path / "clients.csv").read_text() == (other.path / "clients.csv").read_text()
