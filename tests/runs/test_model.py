"""A client's model in a file: the same accuracy as the run recorded, whatever the method."""

import errno
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pfedmoap_flwr import config, methods
from pfedmoap_flwr.engines.in_process import (
    FIRST_NODE_ID,
    InProcessGrid,
    Workers,
    make_context,
    serve_in_process,
)
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.runs.find_model import RunModels, find_model
from pfedmoap_flwr.runs.folder import RunFolder, load_settings
from pfedmoap_flwr.runs.model import Model
from support.federation import kept_head
from support.tiny import CLASSNAMES, NUM_CLIENTS, TINY

EVERY: dict[str, Any] = {
    "num_server_rounds": 2,
    "local_epochs": 1,
    "fraction_train": 0.5,
    "lr": 0.5,
}


def test_images(run: RunFolder, client: int) -> tuple[list[Any], list[int]]:
    """A client's own test images as Pillow has them, and their labels."""
    held = RunModels(run.path).node.federated
    rows = held.clients[client].rows["test"]
    images = held.images.splits["test"].select(rows).cast_column("image", Image())
    return list(images["image"]), held.images.column("test", "label")[rows].tolist()


test_images.__test__ = False  # type: ignore[attr-defined]


def accuracy(model: Model, images: list[Any], labels: list[int]) -> float:
    predicted = model.predict(images)["predicted"]
    names = list(model.classnames)
    return sum(names.index(c) == y for c, y in zip(predicted, labels, strict=True)) / len(labels)


@pytest.mark.parametrize("method", methods.names())
def test_a_files_predictions_are_the_accuracy_that_the_run_recorded(
    method: str, reference: Callable[..., RunFolder], tmp_path: Path
) -> None:
    """Half of the clients train in a round, so that one may have an old head, or none."""
    run = reference(method=method, **EVERY)
    record = run.rounds()[-1]
    for client in range(NUM_CLIENTS):
        file = tmp_path / f"{client}.safetensors"
        made = find_model(run.path, client)
        made.save(file)
        model = find_model(file)
        images, labels = test_images(run, client)
        assert accuracy(model, images, labels) == record.clients[client]["personal-accuracy"]
        assert model.probabilities(images).equal(made.probabilities(images))


def test_a_file_says_what_it_is(reference: Callable[..., RunFolder], tmp_path: Path) -> None:
    run = reference(method="pfedmoap", num_server_rounds=2, local_epochs=1, lr=0.5)
    file = tmp_path / "model.safetensors"
    find_model(run.path, 1).save(file)
    with safe_open(file, framework="pt") as opened:
        said = json.loads(opened.metadata()["pfedmoap"])
        kept = kept_head(run, 1)
        assert all(opened.get_tensor(name).equal(tensor) for name, tensor in kept.items())
    checkpoint = Path(os.environ["PFEDMOAP_ASSETS"]) / "clip" / "tiny.safetensors"
    assert said["clip"] == {
        "model": "tiny",
        "pretrained": "tiny",
        "sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
    }
    assert said["classnames"] == CLASSNAMES
    assert (said["method"], said["client"], said["round"]) == ("pfedmoap", 1, 2)
    assert said["template"] == "a drawing of {}."
    settings = load_settings(run.path).flat()
    left_out = settings.keys() - said["settings"].keys()
    assert said["settings"] == {k: v for k, v in settings.items() if k not in left_out}
    assert str(run.path) not in json.dumps(said)
    assert {"prompt.n-ctx", "lr", "pfedmoap.lambda", "data.name"} <= said["settings"].keys()


def test_owners_are_those_whose_prompts_were_borrowed(
    reference: Callable[..., RunFolder],
) -> None:
    """By the prompts themselves: what was uploaded in round 1 is what is lent in round 2."""
    run = reference(method="pfedmoap", num_server_rounds=2, local_epochs=1, lr=0.5)
    first = {client: kept_head(run, client, after=1)["ctx"] for client in range(NUM_CLIENTS)}
    last = run.rounds()[-1]
    assert not run.rounds()[1].lent  # nobody had a prompt in the pool
    for client in range(NUM_CLIENTS):
        owners = find_model(run.path, client).meaning.owners
        assert owners == tuple(last.lent[client])
        experts = kept_head(run, client)["experts"]
        assert [next(i for i, p in first.items() if p.equal(e)) for e in experts] == [*owners]


def on_nodes(folder: Path, method: str) -> RunFolder:
    """A federation of nodes with state folders of their own, and a server without a run-dir."""
    settings = config.parse({**TINY, "method": method, "num-server-rounds": 2, "local-epochs": 1})
    contexts = {}
    for i in range(NUM_CLIENTS):
        node: dict[str, Any] = {"partition-id": i, "num-partitions": NUM_CLIENTS}
        node["state-dir"] = str(folder / f"node-{i}")
        contexts[FIRST_NODE_ID + i] = make_context(FIRST_NODE_ID + i, node, settings.flat())
    serve_in_process(InProcessGrid(Workers(settings), contexts), settings.flat())
    (run,) = (folder / "runs").iterdir()
    return RunFolder(run)


@pytest.mark.parametrize("method", ["pfedmoap", "promptfl_ft", "tofa"])
def test_a_node_predicts_from_its_state_folder_alone(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = on_nodes(tmp_path, method)
    images, labels = test_images(run, 2)
    shutil.move(run.path, tmp_path / "elsewhere")
    record = RunFolder(tmp_path / "elsewhere").rounds()[-1]
    model = find_model(tmp_path / "node-2")
    assert (model.meaning.client, model.meaning.round, model.meaning.owners) == (2, 2, None)
    assert accuracy(model, images, labels) == record.clients[2]["personal-accuracy"]
    with pytest.raises(UsageError, match=r"has no model of client 3, but of \[2\]"):
        find_model(tmp_path / "node-2", 3)


def test_a_server_alone_has_no_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = on_nodes(tmp_path, "pfedmoap")
    with pytest.raises(UsageError, match=r"client 1 trained in round 2 .* that one's state folder"):
        find_model(run.path, 1)
    with pytest.raises(UsageError, match="neither a run's folder nor the state folder"):
        find_model(tmp_path / "runs")


def test_a_disk_that_is_full_costs_a_node_no_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: Model, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Model, "save", full)
    run = on_nodes(tmp_path, "promptfl")
    assert not any(record.failed for record in run.rounds())
    assert "personal.safetensors cannot be written (No space left on device)" in caplog.text


Spoil = Callable[[dict[str, Any], dict[str, Tensor]], Any]


def renamed(said: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors["prompt"] = tensors.pop("ctx")


SPOILT: dict[str, tuple[Spoil, str]] = {
    "tensor": (renamed, "holds ['prompt'], not ['ctx']"),
    "shape": (
        lambda said, t: t.update(ctx=torch.zeros(3, 32)),
        "ctx has shape (3, 32), not (4, 32",
    ),
    "nan": (lambda said, t: t.update(ctx=t["ctx"] * torch.nan), "ctx is not a number"),
    "digest": (lambda said, t: said["clip"].update(sha256="0" * 64), "other weights of tiny"),
    "method": (lambda said, t: said["settings"].update(method="os"), "method='os': must be one of"),
    "type": (lambda said, t: said.update(classnames=[["a"]]), "in an unknown way"),
    "number": (lambda said, t: said.update(client="1"), "in an unknown way"),
    "format": (lambda said, t: said.update(format=2), "has format 2, not 1"),
    "list": (lambda said, t: said.update(settings=[]), "in an unknown way"),
    "clip": (
        lambda said, t: said["settings"].update({"clip.model": "ViT-C"}),
        "unknown to open_clip",
    ),
    "class": (lambda said, t: said.update(classnames=[]), "classnames must be at least one"),
    "huge": (lambda said, t: said["settings"].update({"prompt.n-ctx": 10**12}), "tokens"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_file_is_one_line(
    name: str, reference: Callable[..., RunFolder], tmp_path: Path
) -> None:
    run = reference(method="promptfl", **EVERY)
    file = tmp_path / "model.safetensors"
    find_model(run.path, 0).save(file)
    with safe_open(file, framework="pt") as opened:
        said, tensors = json.loads(opened.metadata()["pfedmoap"]), {"ctx": opened.get_tensor("ctx")}
    spoil, expected = SPOILT[name]
    spoil(said, tensors)
    save_file(tensors, file, metadata={"pfedmoap": json.dumps(said)})
    with pytest.raises(UsageError, match=r"^[^\n]*$") as raised:
        find_model(file)
    assert str(raised.value).startswith(f"{file}: ")
    assert expected in str(raised.value)


def test_what_is_no_model_is_one_line(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.safetensors"
    save_file({"ctx": torch.zeros(4, 32)}, foreign)
    with pytest.raises(UsageError, match="was not written by pfedmoap"):
        find_model(foreign)
    save_file({"ctx": torch.zeros(4, 32)}, foreign, metadata={"pfedmoap": "[" * 10**5})
    with pytest.raises(UsageError, match="is no model that pfedmoap can use"):
        find_model(foreign)

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "run by the file"),)

    (tmp_path / "evil.safetensors").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UsageError, match=r"evil.safetensors: is no model that pfedmoap can use"):
        find_model(tmp_path / "evil.safetensors")
    assert not (tmp_path / "run by the file").exists()
    with pytest.raises(UsageError, match="no such file"):
        find_model(tmp_path / "absent.safetensors")
