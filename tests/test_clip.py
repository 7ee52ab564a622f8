"""The frozen model: weights by name, by file and by tag; features computed once and kept."""

import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from pfedmoap_flwr.assets import asset
from pfedmoap_flwr.clip import features
from pfedmoap_flwr.clip.features import read_images
from pfedmoap_flwr.clip.load import FrozenClip, find_weights, load_clip, resolve_device
from pfedmoap_flwr.data.images import load_images
from pfedmoap_flwr.errors import UsageError


@pytest.fixture(scope="module")
def tiny() -> FrozenClip:
    return load_clip("tiny", "tiny", "cpu")


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("PFEDMOAP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pictures(count: int = 5) -> datasets.Dataset:
    rng = np.random.default_rng(1)
    images = [Image.fromarray(rng.integers(0, 255, (20, 20, 3), np.uint8)) for _ in range(count)]
    schema = datasets.Features({"image": datasets.Image()})
    return datasets.Dataset.from_dict({"image": images}, features=schema)


def test_features_are_open_clips_own(tiny: FrozenClip, cache: Path) -> None:
    images = pictures()
    model, _, preprocess = open_clip.create_model_and_transforms(
        "tiny", pretrained=str(asset("clip/tiny.safetensors"))
    )
    model.eval()
    with torch.no_grad():
        batch = torch.stack([preprocess(image) for image in images["image"]])
        expected = model.encode_image(batch, normalize=True)
    torch.testing.assert_close(read_images(tiny, images, "features"), expected)


def test_features_are_computed_once(
    tiny: FrozenClip, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = pictures()
    first = read_images(tiny, images, "features")
    monkeypatch.setattr(features, "_compute", None)
    assert torch.equal(first, read_images(tiny, images, "features"))


def test_other_images_or_weights_have_other_features(tiny: FrozenClip, cache: Path) -> None:
    read_images(tiny, pictures(5), "features")
    assert len(read_images(tiny, pictures(6), "features")) == 6
    assert len(list(cache.glob("*.npy"))) == 2
    twin = FrozenClip("tiny", open_clip.create_model("tiny").eval(), *vars_of(tiny))
    assert twin.fingerprint != tiny.fingerprint


def vars_of(clip: FrozenClip) -> tuple:  # type: ignore[type-arg]
    return clip.tokenizer, clip.preprocess, clip.device


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_a_damaged_cache_file_is_rebuilt(
    tiny: FrozenClip, cache: Path, damage: bytes | None
) -> None:
    first = read_images(tiny, pictures(), "features")
    (path,) = cache.glob("*.npy")
    path.write_bytes(path.read_bytes()[:-8] if damage is None else damage)
    assert torch.equal(first, read_images(tiny, pictures(), "features"))


def _read_elsewhere(cache: str) -> np.ndarray:
    os.environ["PFEDMOAP_CACHE"] = cache
    return read_images(load_clip("tiny", "tiny", "cpu"), pictures(), "features").numpy()


def test_processes_that_start_at_once_agree(tiny: FrozenClip, cache: Path) -> None:
    with ProcessPoolExecutor(2) as pool:
        first, second = pool.map(_read_elsewhere, [str(cache)] * 2)
    assert (first == second).all()
    assert len(list(cache.glob("*.npy"))) == 1
    assert not list(cache.glob("*.tmp"))


@pytest.mark.parametrize("reads", ["tokens", "pixels"])
def test_what_cannot_be_read_yet_is_said(tiny: FrozenClip, reads: str) -> None:
    with pytest.raises(UsageError, match=reads):
        read_images(tiny, pictures(), reads)  # type: ignore[arg-type]


def test_zeroshot_text_is_open_clips_own(tiny: FrozenClip) -> None:
    names = ("red panda", "snow_owl")
    tokens = open_clip.get_tokenizer("tiny")(["a photo of a red panda.", "a photo of a snow owl."])
    expected = tiny.model.encode_text(tokens, normalize=True)
    torch.testing.assert_close(tiny.zeroshot(names, "a photo of a {}."), expected)


def test_weights_load_from_a_path_as_from_a_name(tiny: FrozenClip, tmp_path: Path) -> None:
    copy = tmp_path / "weights.safetensors"
    copy.write_bytes(asset("clip/tiny.safetensors").read_bytes())
    assert load_clip("tiny", str(copy), "cpu").fingerprint == tiny.fingerprint


def test_nothing_can_be_trained(tiny: FrozenClip) -> None:
    assert not tiny.model.training
    assert not any(p.requires_grad for p in tiny.model.parameters())


@pytest.mark.parametrize(
    ("model", "pretrained", "words"),
    [
        ("VIT-B-16", "openai", ["clip.model='VIT-B-16'", "did you mean 'ViT-B-16'"]),
        ("tiny", "openai", ["clip.pretrained='openai'", "path of a checkpoint"]),
        ("RN50-quickgelu", "openia", ["clip.pretrained='openia'", "one of openai"]),
        ("ViT-B-16", "openai", ["QuickGELU", "clip.model=ViT-B-16-quickgelu"]),
        ("RN50-quickgelu", "/no/such/file.pt", ["'/no/such/file.pt'", "no such file"]),
    ],
)
def test_wrong_weights_are_named(model: str, pretrained: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as raised:
        find_weights(model, pretrained)
    assert "\n" not in str(raised.value)
    assert all(word in str(raised.value) for word in words), raised.value


def test_openai_weights_are_found_by_name() -> None:
    assert find_weights("ViT-B-16-quickgelu", "openai") == "openai"
    assert find_weights("RN50-quickgelu", "openai") == "openai"


def test_weights_that_cannot_be_had_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host\nsecond line")

    monkeypatch.setattr(open_clip, "create_model_and_transforms", refuse)
    with pytest.raises(UsageError, match=r"no route to host.*clip\.pretrained=/path") as raised:
        load_clip("RN50-quickgelu", "openai", "cpu")
    assert "\n" not in str(raised.value)


def test_torn_weights_are_said(tmp_path: Path) -> None:
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(asset("clip/tiny.safetensors").read_bytes()[:1000])
    with pytest.raises(UsageError, match="could not be loaded"):
        load_clip("tiny", str(torn), "cpu")


def test_cuda_is_asked_for_where_it_is_absent() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(UsageError, match="device='cuda'"):
        resolve_device("cuda")


def test_a_missing_asset_says_how_to_get_it() -> None:
    with pytest.raises(UsageError, match=r"'clip/none\.json' not found.*pip install"):
        asset("clip/none.json")


def test_the_tiny_images_are_found_first() -> None:
    assert len(load_images("emoji-domains").classnames) == 4


def test_a_prompt_that_does_not_fit_names_the_class(tiny: FrozenClip) -> None:
    with pytest.raises(UsageError, match=r"clip\.model=tiny.*red panda"):
        tiny.encoder(("red panda",), 40, "end", False)
