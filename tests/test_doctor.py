"""pfedmoap doctor: status 0 where a run can start, and else one line that says what is missing."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import NUM_CLIENTS, TINY, frozen_clip

from pfedmoap_flwr import config, methods
from pfedmoap_flwr.cli import doctor
from pfedmoap_flwr.cli import main as cli
from pfedmoap_flwr.clip.weights import held_checkpoint
from pfedmoap_flwr.data.images import load_images
from pfedmoap_flwr.federation import parallel

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
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    assert cli.main(["doctor", *WORDS]) == 2
    assert "make room" in capsys.readouterr().err


@pytest.mark.parametrize("name", methods.names())
def test_it_fits_as_many_clients_as_a_run_would(
    name: str, capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config.parse({**TINY, "method": name, "clients-at-once": 0})
    method = methods.load(name)(settings)
    clip, images = frozen_clip(), load_images(settings.data)
    training = doctor._rehearsal(settings, method, clip, images, (64,))
    monkeypatch.setattr(parallel, "cores", lambda: 3)
    for memory, expected in ((1, 1), (10**12, 3)):
        monkeypatch.setattr(parallel, "memory", lambda device, memory=memory: memory)
        assert parallel.fitting(method, clip, training) == expected
        assert cli.main(["doctor", *WORDS, "clients-at-once=0", "--method", name]) == 0
        assert said(capsys.readouterr().out)["at once"].startswith(f"{expected} of ")
    if name == "pfedmoap":
        # The step of a later round, with experts, is the large one
        assert len(training.received["experts"]) == settings.own.num_experts


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
    seen: list[Any] = []
    check = doctor._check
    monkeypatch.setattr(
        doctor, "_check", lambda *a: (seen.append(datasets.config.HF_HUB_OFFLINE), check(*a))
    )
    assert cli.main(["doctor", *WORDS, "data.num-clients=3"]) == 2
    assert seen == [True]
    assert datasets.config.HF_HUB_OFFLINE is False
