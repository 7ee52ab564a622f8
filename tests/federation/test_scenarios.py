"""Clients that never train, other data sets, validation images alone, zero-shot as a check."""

import functools
import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from pfedmoap_flwr import config
from pfedmoap_flwr.clip.features import Reading, read_images
from pfedmoap_flwr.clip.load import load_clip
from pfedmoap_flwr.clip.settings import ClipSettings
from pfedmoap_flwr.clip.template import coop
from pfedmoap_flwr.clip.text import PromptEncoder
from pfedmoap_flwr.data.federated import Federated, Task, federated
from pfedmoap_flwr.data.images import ImageData, load_images
from pfedmoap_flwr.data.settings import DataSettings, ImageSettings
from pfedmoap_flwr.errors import RunFailed, UsageError
from pfedmoap_flwr.federation.sanity import only_guesses, pooled
from pfedmoap_flwr.report import tables
from pfedmoap_flwr.runs import checkpoint
from pfedmoap_flwr.training import node as training_node
from support.federation import Exchange, Federate, forget_data
from support.tiny import CLASSNAMES, NUM_CLIENTS

ONE_ROUND: dict[str, Any] = {"num-server-rounds": 1, "data.min-examples": 2}
TWO_NEW = {"data.new-clients": 2}


def accuracy(ctx: Tensor, names: list[str], data: ImageData, rows: np.ndarray) -> float:
    """The accuracy of a prompt on some test images, counted in NumPy."""
    clip = load_clip(ClipSettings(model="tiny", pretrained="tiny"), "cpu")
    encoder = PromptEncoder(clip.model, clip.tokenizer, names, coop(4, "", "end", clip.n_tokens))
    text = F.normalize(encoder(ctx), dim=-1).detach().numpy()
    images = read_images(clip, data.splits["test"], Reading(), "float16").float().numpy()
    return float(((images @ text.T).argmax(1) == data.column("test", "label"))[rows].mean())


# Clients that never train


def test_new_clients_never_train_and_are_measured_at_the_end(
    federate: Federate, wire: list[Exchange]
) -> None:
    run = federate(method="promptfl", flat=TWO_NEW)
    new = {NUM_CLIENTS - 2, NUM_CLIENTS - 1}
    assert {e.client for e in wire if e.kind == "train"} == set(range(NUM_CLIENTS)) - new
    assert {e.client for e in wire if e.round < 2} == set(range(NUM_CLIENTS)) - new
    *earlier, last = run.rounds()
    assert not any(record.new_clients for record in earlier)
    assert last.new_clients.keys() == new
    assert last.clients.keys() == set(range(NUM_CLIENTS)) - new


def test_the_common_model_is_measured_on_the_new_clients_own_images(federate: Federate) -> None:
    run = federate(method="promptfl", flat=TWO_NEW)
    shared = checkpoint.load(run.path).shared["ctx"]
    held = federated(DataSettings(num_clients=NUM_CLIENTS, new_clients=2, alpha=5.0), 0)
    for client_id, measured in run.rounds()[-1].new_clients.items():
        rows = held.clients[client_id].rows["test"]
        right = accuracy(shared, CLASSNAMES, held.images, rows)
        assert measured["global-accuracy"] == pytest.approx(right)


def test_a_new_client_adapts_as_one_that_trains_does(federate: Federate) -> None:
    """CoOp trains each client by itself: one round of it is what a new client does at the end."""
    trained = federate("trained", method="coop", flat=ONE_ROUND)
    new = federate("new", method="coop", flat={**ONE_ROUND, **TWO_NEW})
    assert new.rounds()[-1].new_clients.keys() == {2, 3}
    for client_id, measured in new.rounds()[-1].new_clients.items():
        before = trained.rounds()[-1].clients[client_id]
        assert measured["personal-accuracy"] == before["personal-accuracy"]
        assert measured["personal-accuracy"] != measured["global-accuracy"]
        assert (
            measured["zeroshot-accuracy"]
            == (trained.rounds()[0].clients[client_id]["zeroshot-accuracy"])
        )
    # Nothing of it lies on the new clients' disks
    assert {path.parent.name for path in new.path.rglob("*.safetensors")} == {
        new.path.name,
        "client-0",
        "client-1",
    }


def test_new_clients_are_told_apart_in_the_summary_and_the_tables(federate: Federate) -> None:
    run = federate(method="promptfl", flat=TWO_NEW)
    said, new = run.summary(), run.rounds()[-1].new_clients.values()
    mean = sum(measured["personal-accuracy"] for measured in new) / 2
    assert (said["clients"], said["new_clients"]) == (2, 2)
    assert said["new_personal_accuracy"] == pytest.approx(mean)
    assert {row["client"]: row["new"] for row in run.clients()} == {0: 0, 1: 0, 2: 1, 3: 1}
    assert all(row["personal_accuracy"] is not None for row in run.clients())
    console = Console(width=300, record=True, file=io.StringIO())
    tables.print_summary(said, console)
    assert console.export_text().count("new clients, personal") == 1


@pytest.mark.parametrize("method", ["pfedmoap", "fedjets", "fedspa", "zeroshot", "promptfl_ft"])
def test_every_kind_of_method_meets_new_clients(federate: Federate, method: str) -> None:
    run = federate(method=method, flat={**ONE_ROUND, **TWO_NEW})
    assert run.summary()["new_personal_accuracy"] >= 0
    assert run.summary()["failures"] == 0


def test_somebody_has_to_train() -> None:
    with pytest.raises(UsageError, match=r"new-clients=4: must be less than data\.num-clients"):
        config.parse({"data.num-clients": 4, "data.new-clients": 4})


# Other data sets


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    """A folder of images of classes that are not the tiny data set's."""
    rng = np.random.default_rng(1)
    for number, name in enumerate(["cat", "horse", "red panda"]):
        for split, count in {"train": 2, "test": 5}.items():
            place = tmp_path / "animals" / split / name
            place.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(rng.normal(80 * number, 40, (16, 16, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i}.png")
    return tmp_path / "animals"


def test_another_set_is_measured_with_the_common_model_at_the_end(
    federate: Federate, animals: Path
) -> None:
    on = f"folder:{animals},emoji-domains"
    run = federate(method="promptfl", flat={"eval.on": on})
    shared = checkpoint.load(run.path).shared["ctx"]
    data = load_images(ImageSettings(name="folder", path=str(animals)))
    names, everyone = list(data.classnames), np.arange(15)
    last, said = run.rounds()[-1], run.summary()
    assert not any(record.on for record in run.rounds()[:-1])
    right = accuracy(shared, names, data, everyone)
    assert said["on_folder_global_accuracy"] == last.on["folder"]["global"] == pytest.approx(right)
    own, rows = load_images("emoji-domains"), np.arange(64)
    right = accuracy(shared, CLASSNAMES, own, rows)
    assert said["on_emoji-domains_global_accuracy"] == pytest.approx(right)
    assert 0 <= said["on_folder_zeroshot_accuracy"] <= 1
    console = Console(width=300, record=True, file=io.StringIO())
    tables.print_summary(said, console)
    assert "on folder, global" in console.export_text()


def test_a_method_of_the_trained_classes_says_that_it_cannot(
    federate: Federate, animals: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = federate(method="tofa", flat={**ONE_ROUND, "eval.on": f"folder:{animals}"})
    assert "no accuracy on folder: counts, scores, sums would be of other" in caplog.text
    assert run.rounds()[-1].on["folder"].keys() == {"zeroshot"}


def test_a_set_that_is_not_there_is_refused_before_training(federate: Federate) -> None:
    with pytest.raises(UsageError, match=r"eval\.on, folder: .*there is nothing at /none"):
        federate(method="promptfl", flat={"eval.on": "folder:/none"})
    for text in ("dtd,dtd", "dtd,"):
        with pytest.raises(UsageError, match="each name once"):
            config.parse({"eval.on": text})


# Validation images alone


def test_with_validation_images_alone_no_test_image_is_read(
    federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test images are replaced by bytes that are no image: whoever reads one fails."""
    flat = {"data.base-classes": 0.5, "eval.on": "emoji-domains", **TWO_NEW, **ONE_ROUND}
    whole = federate("whole", method="promptfl", flat=flat)

    @functools.lru_cache
    def spoilt(settings: ImageSettings) -> ImageData:
        data = load_images(settings)
        test = data.splits["test"].cast_column("image", datasets.Image(decode=False))
        broken = [{"bytes": b"no image", "path": None}] * len(test)
        columns = {n: list(test[n]) for n in ("label", "domain")}
        features = data.splits["test"].features
        table = datasets.Dataset.from_dict({"image": broken, **columns}, features=features)
        return ImageData(**{**vars(data), "splits": {**data.splits, "test": table}})

    for module in ("data.federated", "training.elsewhere"):
        monkeypatch.setattr(f"pfedmoap_flwr.{module}.load_images", spoilt)
    forget_data()
    run = federate("validation", method="promptfl", flat={**flat, "eval.split": "validation"})
    said = run.summary()
    for name in ("personal_validation_accuracy", "global_validation_accuracy"):
        assert said[name] == whole.summary()[name]
    assert said["new_personal_validation_accuracy"] > 0
    assert said["on_emoji-domains_global_accuracy"] > 0
    assert said["personal_accuracy"] is None
    assert not [key for key in said if "novel" in key or "base" in key]
    with pytest.raises(RunFailed, match="UnidentifiedImageError"):
        federate("test", method="promptfl", flat=flat)
    forget_data()


def test_validation_alone_needs_validation_images(federate: Federate, animals: Path) -> None:
    flat = {
        "data.name": "folder",
        "data.path": str(animals),
        "data.partition": "iid",
        "data.min-examples": 1,
        "data.num-clients": 2,
        "data.validation": 0.0,
        "eval.split": "validation",
    }
    with pytest.raises(UsageError, match="nobody has validation images"):
        federate(method="promptfl", flat=flat)


# Zero-shot as a check


@pytest.mark.parametrize(
    ("accuracy", "images", "classes", "guesses"),
    [
        (0.0981, 4573, 10, True),  # the paper's DomainNet
        (0.094, 508, 10, True),  # the paper's Office
        (0.6217, 2463, 102, False),  # the paper's Flowers
        (0.02, 2463, 102, False),  # twice chance
        (0.010, 2463, 102, True),
        (0.0, 2463, 102, True),
        (0.55, 1000, 2, False),
        (0.505, 1000, 2, True),
        (0.0, 20, 10, False),  # too few images to tell
        (0.25, 16, 4, False),
    ],
)
def test_what_guessing_gives(accuracy: float, images: int, classes: int, guesses: bool) -> None:
    assert only_guesses(accuracy * images, images, classes) == guesses


def test_no_single_client_speaks_for_all() -> None:
    honest, sizes = dict.fromkeys(range(9), 0.5), dict.fromkeys(range(9), 20)
    right, images = pooled({**honest, 9: 0.0}, {**sizes, 9: 10**8})
    assert right / images == pytest.approx(0.45)


def test_wrong_class_names_stop_the_run_before_training(
    federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The tiny CLIP tells the first two classes apart, although its weights are random
    flat = {"data.base-classes": 0.5, "eval.below-chance": "stop", **ONE_ROUND}
    right = federate("right", method="zeroshot", flat=flat)
    assert right.summary()["zeroshot_accuracy"] > 0.9
    made = federated

    def misnamed(data: DataSettings, seed: int) -> Federated:
        held = made(data, seed)
        turned = Task(held.task.classnames[::-1], held.task.template, held.task.held_out)
        return Federated(held.images, held.clients, turned, held.open_rows)

    monkeypatch.setattr(training_node, "federated", misnamed)
    forget_data()
    with pytest.raises(RunFailed, match=r"guessing among 2 .* wrong class names.*=go-on runs"):
        federate("wrong", method="zeroshot", flat=flat)
    # Nothing of it is in the way of the next try
    run = federate("wrong", method="zeroshot", flat={**flat, "eval.below-chance": "go-on"})
    assert [record.round for record in run.rounds()] == [0, 1]
    assert run.summary()["zeroshot_accuracy"] < 0.1
    forget_data()


def test_clients_of_one_process_measure_the_open_images_put_together_once(
    federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_data()
    counts: list[int] = []
    rows_of = training_node.Node.rows_of

    def counted(self: training_node.Node, name: str, rows: np.ndarray) -> Any:
        counts.append(len(rows))
        return rows_of(self, name, rows)

    monkeypatch.setattr(training_node.Node, "rows_of", counted)
    federate(method="promptfl", flat={"data.base-classes": 0.5, **ONE_ROUND})
    # 32 test images of base and 32 of novel classes: for the method and for zero-shot the same
    assert counts.count(32) == 2
