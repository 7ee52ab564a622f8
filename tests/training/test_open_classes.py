"""Base and novel classes: who holds what, and what is measured on classes nobody trained."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from pfedmoap_flwr import methods
from pfedmoap_flwr.clip.features import Reading, read_images
from pfedmoap_flwr.clip.load import load_clip
from pfedmoap_flwr.clip.settings import ClipSettings
from pfedmoap_flwr.clip.template import coop
from pfedmoap_flwr.clip.text import PromptEncoder
from pfedmoap_flwr.data import SPLITS
from pfedmoap_flwr.data.federated import Task, federated
from pfedmoap_flwr.data.images import load_images
from pfedmoap_flwr.data.settings import DataSettings
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.base import Split
from pfedmoap_flwr.report import render, tables
from pfedmoap_flwr.report.build import Wishes, build
from pfedmoap_flwr.report.collect import collect
from pfedmoap_flwr.runs import checkpoint
from pfedmoap_flwr.runs.folder import RunFolder
from pfedmoap_flwr.training.local import train
from pfedmoap_flwr.training.open_classes import OtherClasses
from support.federation import Federate, kept_head, make_method, make_work, run_tiny
from support.tiny import CLASSNAMES, NUM_CLIENTS

HALF = DataSettings(num_clients=NUM_CLIENTS, alpha=5.0, min_examples=2, base_classes=0.5)
OPEN = {"data.base-classes": 0.5, "data.min-examples": 2}


def make_open(name: str, **changes: Any) -> Any:
    """A method of the tiny data set's first two classes; the others are held out."""
    method = make_method(name, **changes)
    task = Task(tuple(CLASSNAMES[:2]), "a drawing of {}.", tuple(CLASSNAMES[2:]))
    return type(method)(method.settings, method.own, method.clip, task)


def other_classes(method: Any) -> OtherClasses:
    """The method's heads for the classes that are held out."""
    return OtherClasses(method, method.task.turned())


def test_clients_hold_the_first_classes_alone_and_all_test_images_are_of_one_part() -> None:
    held = federated(HALF, 0)
    assert held.task.classnames == tuple(CLASSNAMES[:2])
    assert held.task.held_out == tuple(CLASSNAMES[2:])
    for split in SPLITS:
        labels = held.images.column(split, "label")
        rows = np.concatenate([client.rows[split] for client in held.clients.values()])
        assert sorted(rows) == np.flatnonzero(labels < 2).tolist()
    labels = held.images.column("test", "label")
    assert set(labels[held.open_rows["base"]]) == {0, 1}
    assert set(labels[held.open_rows["novel"]]) == {2, 3}
    assert sum(map(len, held.open_rows.values())) == len(labels)


@pytest.mark.parametrize(("share", "base"), [(0.9, 4), (0.1, 1)])
def test_a_share_that_leaves_nothing_to_compare_is_refused(share: float, base: int) -> None:
    with pytest.raises(UsageError, match=f"base-classes={share} makes {base} of 4 classes"):
        federated(HALF.model_copy(update={"base_classes": share}), 0)


# A domain that nobody holds


def test_nobody_holds_the_domain_that_is_left_out() -> None:
    data = DataSettings(num_clients=2, alpha=5.0, left_out_domain="photo")
    held = federated(data, 0)
    for split in SPLITS:
        domains = held.images.column(split, "domain")
        rows = np.concatenate([client.rows[split] for client in held.clients.values()])
        assert sorted(rows) == np.flatnonzero(domains == 1).tolist()
    assert held.open_rows.keys() == {"unseen"}
    unseen = held.open_rows["unseen"]
    assert unseen.tolist() == np.flatnonzero(held.images.column("test", "domain") == 0).tolist()
    assert {client.domain for client in held.clients.values()} == {"sketch"}


def test_classes_and_a_domain_can_both_be_left_out() -> None:
    held = federated(HALF.model_copy(update={"left_out_domain": "sketch", "num_clients": 2}), 0)
    counts = {name: len(rows) for name, rows in held.open_rows.items()}
    # 8 test images of each class and domain
    assert counts == {"base": 16, "novel": 16, "unseen": 16}


@pytest.mark.parametrize("name", ["cartoon", "Photo"])
def test_a_domain_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"left-out-domain='{name}': emoji-domains has photo, sk"):
        federated(DataSettings(num_clients=2, left_out_domain=name), 0)


def test_the_unseen_domain_is_measured_on_all_its_test_images(federate: Federate) -> None:
    options = {"data.left-out-domain": "sketch", "data.num-clients": 2}
    run = federate(method="promptfl", flat=options)
    data, last = load_images("emoji-domains"), run.rounds()[-1]
    images = read_images(
        load_clip(ClipSettings(model="tiny", pretrained="tiny"), "cpu"),
        data.splits["test"],
        Reading(),
        "float16",
    )
    unseen = torch.from_numpy(data.column("test", "domain") == 1)
    labels = torch.from_numpy(data.column("test", "label"))[unseen]
    for client_id, measured in last.clients.items():
        head = make_method("promptfl").build()
        head.load(kept_head(run, client_id))
        right = (head(images.float()[unseen]).argmax(1) == labels).double().mean()
        assert measured["personal-unseen-accuracy"] == pytest.approx(float(right))
    mean = last.mean("personal-unseen-accuracy")
    assert run.summary()["personal_unseen_accuracy"] == mean
    assert "zeroshot_unseen_accuracy" in run.summary()
    assert "personal_hm" not in run.summary()


# What a method can


@pytest.mark.parametrize("name", methods.names())
def test_a_method_measures_novel_classes_unless_what_travels_belongs_to_the_trained(
    name: str,
) -> None:
    method = make_open(name)
    if name in {"fedspa", "gh_ofl", "tofa"}:  # class means and classifiers
        with pytest.raises(ValueError, match=r"counts.* would be of other classes"):
            other_classes(method)
    else:
        assert other_classes(method).method.task.classnames == tuple(CLASSNAMES[2:])


def test_class_specific_vectors_belong_to_their_classes() -> None:
    with pytest.raises(ValueError, match="ctx would be of other classes"):
        other_classes(make_open("coop", **{"prompt.class-specific": True}))


def test_what_a_client_learned_goes_over_and_what_is_of_its_classes_stays() -> None:
    method = make_open("fedmp")
    head, images = method.build(), Split(torch.randn(6, 64), torch.arange(6) % 2)
    work = make_work(method, head, images)
    train(method, [work])
    novel = other_classes(method).work(work).head
    fresh = other_classes(method).method.build()
    for name, parameter in novel.named_parameters():
        trained = name.startswith("adapter")
        assert torch.equal(parameter, head.get_parameter(name)) == trained
        assert torch.equal(parameter, fresh.get_parameter(name)) != trained


def test_novel_classes_are_those_of_the_file_of_names_too(tmp_path: Path) -> None:
    names = tmp_path / "names.toml"
    names.write_text('"snow_owl" = ["white owl", "owl"]\n"red panda" = ["panda"]\n')
    method = make_open("promptfl", **{"prompt.names": str(names)})
    assert method.names == (("panda",), ("blue whale",))
    assert other_classes(method).method.names == (("green tree frog",), ("white owl", "owl"))


# Runs


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """PromptFL trained on half of the classes."""
    return run_tiny(tmp_path_factory.mktemp("open") / "run", method="promptfl", flat=OPEN)


def right(ctx: Tensor, names: list[str], first: int) -> float:
    """The accuracy of a prompt on all test images of some classes, counted in NumPy."""
    settings = ClipSettings(model="tiny", pretrained="tiny")
    clip = load_clip(settings, "cpu")
    data = load_images("emoji-domains")
    template = coop(4, "", "end", clip.n_tokens)
    encoder = PromptEncoder(clip.model, clip.tokenizer, names, template)
    text = F.normalize(encoder(ctx), dim=-1).detach().numpy()
    images = read_images(clip, data.splits["test"], Reading(), "float16").float().numpy()
    labels = data.column("test", "label")
    mine = (labels >= first) & (labels < first + len(names))
    return float(((images[mine] @ text.T).argmax(1) + first == labels[mine]).mean())


@pytest.mark.parametrize(("part", "first"), [("base", 0), ("novel", 2)])
def test_accuracies_are_those_of_the_trained_prompts_on_all_images(
    halved: RunFolder, part: str, first: int
) -> None:
    names = CLASSNAMES[first : first + 2]
    last = halved.rounds()[-1]
    shared = checkpoint.load(halved.path).shared["ctx"]
    for client_id, measured in last.clients.items():
        own = kept_head(halved, client_id)["ctx"]
        assert measured[f"personal-{part}-accuracy"] == pytest.approx(right(own, names, first))
        assert measured[f"global-{part}-accuracy"] == pytest.approx(right(shared, names, first))


def test_the_summary_combines_them(halved: RunFolder) -> None:
    said, clients = halved.summary(), halved.rounds()[-1].clients.values()
    local, base, novel = (
        sum(m[f"personal-{part}accuracy"] for m in clients) / len(clients)
        for part in ("", "base-", "novel-")
    )
    assert said["personal_base_accuracy"] == pytest.approx(base)
    assert said["personal_novel_accuracy"] == pytest.approx(novel)
    hm = 2 * base * novel / (base + novel)
    assert said["personal_hm"] == pytest.approx(hm)
    assert said["personal_cm"] == pytest.approx((local + hm) / 2)
    assert said["global_hm"] > 0
    assert said["zeroshot_hm"] > 0
    assert "personal_novel_accuracy" in halved.clients()[0]
    console = Console(width=300, record=True, file=io.StringIO())
    tables.print_summary(said, console)
    render.print_report(build(collect([halved.path]), Wishes()), console)
    text = console.export_text()
    assert text.count("personal, HM of both") == 2
    assert text.count(f"{100 * hm:.1f}") == 2


def test_fed_mp_is_measured_on_classes_no_client_trained_as_a_stream(
    federate: Federate, caplog: pytest.LogCaptureFixture
) -> None:
    run = federate(method="fedmp", flat={**OPEN, "fedmp.uncertainty": 1.0})
    without = federate("without", method="fedmp", flat={**OPEN, "fedmp.uncertainty": 0.0})
    streamed, plain = (
        [m["personal-novel-accuracy"] for m in each.rounds()[-1].clients.values()]
        for each in (run, without)
    )
    assert streamed != plain
    assert "no accuracy on novel classes" not in caplog.text


def test_a_method_of_the_trained_classes_runs_and_says_what_is_missing(
    federate: Federate, caplog: pytest.LogCaptureFixture
) -> None:
    run = federate(method="tofa", flat=OPEN)
    assert "no accuracy on novel classes: counts, scores, sums would be of other" in caplog.text
    said = run.summary()
    assert "personal_base_accuracy" in said
    assert not {"personal_novel_accuracy", "personal_hm", "personal_cm"} & said.keys()
    assert "zeroshot_novel_accuracy" in said
