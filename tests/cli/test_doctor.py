"""pfedmoap doctor: status 0 where a run can start, and else one line that says what is missing."""

import shutil
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pfedmoap_flwr import config, methods
from pfedmoap_flwr.cli import doctor
from pfedmoap_flwr.cli import main as cli
from pfedmoap_flwr.clip.weights import held_checkpoint
from pfedmoap_flwr.data.federated import Federated, federated
from pfedmoap_flwr.data.settings import DataSettings
from pfedmoap_flwr.training import capacity
from support.federation import Federate
from support.tiny import NUM_CLIENTS, TINY, frozen_clip

WORDS = [f"{key}={value}" for key, value in TINY.items()]
Printed = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _nothing_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a data set nor weights, and no way to the hub."""
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("PFEDMOAP_CACHE", str(tmp_path / "cache"))


def said(printed: str) -> dict[str, str]:
    return {line[:13].strip(): line[14:] for line in printed.splitlines()}


def test_a_run_can_start(capsys: Printed, tmp_path: Path) -> None:
    assert cli.main(["doctor", *WORDS]) == 0
    lines = said(capsys.readouterr().out)
    assert f"torch {torch.__version__.split('+')[0]}" in lines["packages"]
    assert "emoji-domains" in lines["data here"]
    assert lines["weights here"] == "for tiny: tiny (bundled)"
    assert str(tmp_path / "cache") in lines["cache"]
    assert "to compute first (train, validation, test)" in lines["features"]
    assert lines["at once"].startswith(f"1 of {NUM_CLIENTS} ")
    assert "can start" in lines["verdict"]
    # It only looked
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        (["data.name=pacs"], "the images of pacs are not on this machine"),
        (["data.name=office-caltech10"], "the hub has no table"),
        (["data.num-clients=3"], "multiple of the 2 domains"),
        (["clip.model=RN50-quickgelu", "clip.pretrained=openai"], "weights 'openai' for RN50"),
        (["clip.pretrained=/no/such.pt"], "no such file"),
        (["pfedmoap.d-gating=7"], "must divide CLIP's width"),
        (["local-epoch=1"], "did you mean 'local-epochs'"),
    ],
)
def test_what_is_missing_is_one_line(words: list[str], missing: str, capsys: Printed) -> None:
    assert cli.main(["doctor", *WORDS, *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pfedmoap: ")
    assert error.count("\n") == 1
    assert missing in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_without_cuda_it_says_why(capsys: Printed) -> None:
    assert cli.main(["doctor", *WORDS, "device=cuda"]) == 2
    captured = capsys.readouterr()
    assert said(captured.out)["cuda"].startswith("no")
    assert "no CUDA device" in captured.err


def test_a_full_disk_is_seen(
    capsys: Printed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert cli.main(["doctor", *WORDS]) == 2
    assert "make room" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", methods.names())
def test_it_fits_as_many_clients_as_a_run_does(
    name: str,
    capsys: Printed,
    monkeypatch: pytest.MonkeyPatch,
    federate: Federate,
) -> None:
    measure, needed = capacity.saved_bytes, []

    def noting(*said: Any, **more: Any) -> int:
        needed.append(measure(*said, **more))
        return needed[-1]

    monkeypatch.setattr(capacity, "saved_bytes", noting)
    monkeypatch.setattr(capacity, "cores", lambda: 3)
    words = ["doctor", *WORDS, "clients-at-once=0", "--method", name]
    for memory, expected in ((1, 1), (10**12, 3)):
        monkeypatch.setattr(capacity, "memory", lambda device, memory=memory: memory)
        assert cli.main(words) == 0
        assert said(capsys.readouterr().out)["at once"].startswith(f"{expected} of ")
    rehearsed = needed.pop()
    # The step of a later round, with all that was lent, is the large one
    needed.clear()
    federate(method=name, clients_at_once=0)
    assert rehearsed == max(needed)


def test_the_rehearsal_ends_in_a_round_in_which_all_can_be_lent() -> None:
    settings = config.parse({**TINY, "method": "pfedmoap"})
    held = federated(settings.data, settings.seed)
    _, work = doctor.rehearsal(settings, frozen_clip(), held)
    assert work.round == 2
    assert len(work.received["experts"]) == settings.own.num_experts


# What fails in a run's first rounds fails here

METHODS = {
    "misread": """
        class Misread(Method):  # a prompt head knows no tokens
            reading = Reading("tokens")
        """,
    "confused": """
        class TwoClasses(PromptHead):
            def classify(self, image_features, encoded):
                return super().classify(image_features, encoded)[:, :2]

            def forward(self, image_features):
                return super().classify(image_features, self.encode())

        class Confused(Method):
            head = TwoClasses
        """,
    "unadapted": """
        class Unadapted(Method):
            def adapt(self, work):
                raise RuntimeError("no prototype\\nof any class")
        """,
    "secretive": """
        class Secretive(Method):
            def upload(self, work):
                return {}
        """,
    "forgetful": """
        class Forgetful(Method):
            def merge(self, state, uploads):
                state.pool = {i: {} for i in uploads}

            def send(self, state, client_ids, *, train):
                lent = {i: state.pool[i]["ctx"] for i in client_ids if state.pool}
                return super().send(state, client_ids, train=train)
        """,
}
SAID = {
    "misread": "Error: ",
    "confused": "the head gives logits (8, 2), not (B, C) = (8, 4)",
    "unadapted": "RuntimeError: no prototype of any class",
    "secretive": "uploaded [], not ['ctx']",
    "forgetful": "KeyError: 'ctx'",
}


@pytest.fixture
def more_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The methods above, found as those of the package are."""
    (tmp_path / "methods").mkdir()
    for name, source in METHODS.items():
        text = (
            "from pfedmoap_flwr.clip.features import Reading\n"
            "from pfedmoap_flwr.methods.base import Method, PromptHead\n"
        )
        (tmp_path / "methods" / f"{name}.py").write_text(text + textwrap.dedent(source))
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path / "methods")])
    methods.names.cache_clear()
    yield
    for name in METHODS:
        sys.modules.pop(f"pfedmoap_flwr.methods.{name}", None)
    methods.names.cache_clear()
    methods.load.cache_clear()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.usefixtures("more_methods")
def test_a_method_that_cannot_run_is_found(name: str, capsys: Printed, tmp_path: Path) -> None:
    assert cli.main(["doctor", *WORDS, "--method", name]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"pfedmoap: method {name} cannot run with these settings: ")
    assert error.count("\n") == 1
    assert SAID[name] in error


@pytest.mark.parametrize("name", ["misread", "unadapted", "secretive"])
@pytest.mark.usefixtures("more_methods")
def test_such_a_run_fails_indeed(name: str, tmp_path: Path) -> None:
    assert cli.main(["run", *WORDS, "--method", name, f"run-dir={tmp_path / 'run'}"]) == 1


def test_a_sentence_that_cannot_be_filled_in_is_found(capsys: Printed) -> None:
    assert cli.main(["doctor", *WORDS, "data.template=a {thing}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "thing" in error


def test_published_weights_are_found_where_the_hub_client_keeps_them(tmp_path: Path) -> None:
    assert held_checkpoint("RN50-quickgelu", "openai") is None
    revision = "a1" * 20
    repository = tmp_path / "hub" / "models--timm--resnet50_clip.openai"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    file = repository / "snapshots" / revision / "open_clip_model.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"")
    assert held_checkpoint("RN50-quickgelu", "openai") == file


def test_it_leaves_the_hub_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    seen: list[bool] = []

    def looked(data: DataSettings, seed: int) -> Federated:
        seen.append(datasets.config.HF_HUB_OFFLINE)
        return federated(data, seed)

    monkeypatch.setattr(doctor, "federated", looked)
    assert cli.main(["doctor", *WORDS, "data.num-clients=3"]) == 2
    assert seen == [True]
    assert datasets.config.HF_HUB_OFFLINE is False
