"""A tiny random CLIP and a tiny two-domain data set, found the way the embedded ones are."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import open_clip
import pytest
import torch
from flwr.app import Message
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from pfedmoap_flwr import config, methods
from pfedmoap_flwr.clip.load import FrozenClip, load_clip
from pfedmoap_flwr.clip.settings import ClipSettings
from pfedmoap_flwr.data.federated import Task, federated
from pfedmoap_flwr.engines import in_process
from pfedmoap_flwr.engines.in_process import FIRST_NODE_ID, InProcessGrid, run_in_process
from pfedmoap_flwr.federation import client, messages
from pfedmoap_flwr.methods.base import Head, Method, Split, Work
from pfedmoap_flwr.runs.folder import RunFolder
from pfedmoap_flwr.training import node

CLASSNAMES = ["red panda", "blue whale", "green tree frog", "snow_owl"]
DOMAINS = ["photo", "sketch"]
NUM_CLIENTS = 4
TINY_CLIP = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2},
}
TINY: dict[str, Any] = {
    "clip.model": "tiny",
    "clip.pretrained": "tiny",
    "data.num-clients": NUM_CLIENTS,
    "data.alpha": 5.0,
    "prompt.n-ctx": 4,
    "num-server-rounds": 2,
    "local-epochs": 2,
    "batch-size": 8,
    "pfedmoap.d-gating": 32,
    "pfedmoap.heads": 4,
    "pfedmoap.num-experts": 2,
    "device": "cpu",
    "clients-at-once": 1,
}
PER_CLASS = {"train": 12, "validation": 4, "test": 8}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def tiny_assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An assets folder with clip/tiny and a small emoji-domains; every test sees it first."""
    folder = tmp_path_factory.mktemp("assets")
    patch = pytest.MonkeyPatch()
    patch.setenv("PFEDMOAP_ASSETS", str(folder))
    patch.setenv("PFEDMOAP_CACHE", str(tmp_path_factory.mktemp("cache")))
    patch.setenv("PFEDMOAP_HOME", str(tmp_path_factory.mktemp("home")))
    (folder / "clip").mkdir()
    (folder / "clip" / "tiny.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(folder / "clip")
    torch.manual_seed(0)
    model = open_clip.create_model("tiny")
    # A random vision tower tells images apart better with larger weights; a text tower like that
    # would turn rounding errors of the context into other features
    large = "visual.transformer.resblocks"
    weights = {n: t * (3 if large in n else 1) for n, t in model.state_dict().items()}
    save_file({n: t.contiguous() for n, t in weights.items()}, folder / "clip" / "tiny.safetensors")
    _write_images(folder / "emoji-domains")
    return folder


def _write_images(folder: Path) -> None:
    """One colour per class, darker in the second domain, with noise."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    colours = np.array([[220, 40, 40], [40, 40, 220], [40, 200, 40], [230, 230, 230]])
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=CLASSNAMES),
            "domain": datasets.ClassLabel(names=DOMAINS),
        }
    )
    for split, count in PER_CLASS.items():
        rows: dict[str, list[Any]] = {"image": [], "label": [], "domain": []}
        for domain in range(len(DOMAINS)):
            for label in range(len(CLASSNAMES)):
                for _ in range(count):
                    noise = rng.normal(0, 30, (16, 16, 3))
                    pixels = np.clip(colours[label] * (1 - 0.5 * domain) + noise, 0, 255)
                    rows["image"].append(Image.fromarray(pixels.astype(np.uint8)))
                    rows["label"].append(label)
                    rows["domain"].append(domain)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")


def forget_data() -> None:
    """Let data sets be divided and read anew, as in a fresh process."""
    federated.cache_clear()
    node._node.cache_clear()
    client._shared.cache_clear()


def frozen_clip(model: str = "tiny", pretrained: str | Path = "", **changes: Any) -> FrozenClip:
    """Load a model on the CPU; its weights have its own name, unless a file is given."""
    settings = ClipSettings(model=model, pretrained=str(pretrained or model), **changes)
    return load_clip(settings, "cpu")


def make_method(name: str, **changes: Any) -> Method[Any, Any]:
    """A method with the tiny settings, the tiny CLIP and the tiny data set's classes."""
    changes = {key.replace("_", "-"): value for key, value in changes.items()}
    settings = config.parse({**TINY, "method": name, **changes})
    clip = load_clip(settings.clip, "cpu")
    task = Task(tuple(CLASSNAMES), "a drawing of {}.")
    return methods.load(name)(settings, settings.own, clip, task)


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


@pytest.fixture
def federate(tmp_path: Path) -> Callable[..., RunFolder]:
    """Run a tiny federation in process; `changes` are flat settings with "_" for "-"."""

    def run(name: str = "run", **changes: Any) -> RunFolder:
        folder = tmp_path / name
        flat = {**TINY, "run-dir": str(folder), "state-dir": str(folder / "clients")}
        flat |= changes.pop("flat", {})
        flat |= {key.replace("_", "-"): value for key, value in changes.items()}
        run_in_process(config.parse(flat))
        return RunFolder(folder)

    return run


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


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> list[Exchange]:
    """All that travels in the test's federations after the introductions, in order."""
    exchanges: list[Exchange] = []

    class RecordingGrid(InProcessGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            ids = []
            for message in messages:
                ids += super().push_messages([message])
                if "arrays" in message.content:
                    exchanges.append(_exchange(message, self.replies[ids[-1]]))
            return ids

    monkeypatch.setattr(in_process, "InProcessGrid", RecordingGrid)
    return exchanges


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


def rounds(run: RunFolder) -> list[dict[str, Any]]:
    """Return what rounds.jsonl says, apart from the time it took."""
    return [{**asdict(record), "seconds": None} for record in run.rounds()]


def tensor_files(run: RunFolder) -> dict[str, bytes]:
    """Return the checkpoint and every kept head, byte for byte; a run's id is its own."""
    files = sorted(run.path.rglob("*.safetensors"))
    names = [str(path.relative_to(run.path)).replace(run.run_id, "RUN") for path in files]
    return {name: path.read_bytes() for name, path in zip(names, files, strict=True)}


def assert_same(run: RunFolder, other: RunFolder) -> None:
    """Two runs left the same bytes and the same numbers."""
    assert rounds(run) == rounds(other)
    assert tensor_files(run) == tensor_files(other)
    assert (run.path / "clients.csv").read_text() == (other.path / "clients.csv").read_text()
