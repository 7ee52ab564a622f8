"""What is read of images: as open_clip reads it, once, mapped from disk, whole or not at all."""

import logging
import multiprocessing
import os
import time
import weakref
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor

from pfedmoap_flwr.assets import asset
from pfedmoap_flwr.clip import features, load
from pfedmoap_flwr.clip.features import (
    Reading,
    feature_files,
    read_images,
    read_shape,
    read_splits,
)
from pfedmoap_flwr.clip.load import FrozenClip
from pfedmoap_flwr.clip.patches import project_positions
from pfedmoap_flwr.clip.tower import encode_image
from pfedmoap_flwr.errors import UsageError
from support.models import make
from support.tiny import frozen_clip

FEATURES, TOKENS, PIXELS = Reading(), Reading("tokens"), Reading("pixels")


@pytest.fixture(scope="module")
def tiny() -> FrozenClip:
    return frozen_clip()


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("PFEDMOAP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def towers(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """The image towers that were loaded, to see which of them are alive."""
    loaded = []
    original = FrozenClip.image_tower

    def seen(clip: FrozenClip) -> Any:
        context = original(clip)
        enter = context.__enter__

        class Watch:
            def __enter__(self) -> Any:
                tower = enter()
                loaded.append(weakref.ref(tower))
                return tower

            def __exit__(self, *error: Any) -> Any:
                return context.__exit__(*error)

        return Watch()

    monkeypatch.setattr(FrozenClip, "image_tower", seen)
    return loaded


def pictures(count: int = 5, seed: int = 1) -> datasets.Dataset:
    rng = np.random.default_rng(seed)
    images = [Image.fromarray(rng.integers(0, 255, (20, 24, 3), np.uint8)) for _ in range(count)]
    schema = datasets.Features({"image": datasets.Image()})
    return datasets.Dataset.from_dict({"image": images}, features=schema)


def prepared(clip: FrozenClip, images: datasets.Dataset) -> Tensor:
    return torch.stack([clip.preprocess(image) for image in images["image"]])


# What is read


def test_features_are_open_clips_own(tiny: FrozenClip) -> None:
    images = pictures()
    model, _, preprocess = open_clip.create_model_and_transforms(
        "tiny", pretrained=str(asset("clip/tiny.safetensors"))
    )
    model.eval()
    with torch.no_grad():
        batch = torch.stack([preprocess(image) for image in images["image"]])
        expected = model.encode_image(batch)
    torch.testing.assert_close(read_images(tiny, images, FEATURES), expected)


@pytest.mark.parametrize("name", ["rn", "vit-custom", "coca"])
def test_features_of_every_kind_of_tower(name: str, tmp_path: Path) -> None:
    model, path = make(name, tmp_path)
    clip = frozen_clip(f"made-{name}", path)
    with torch.no_grad():
        expected = model.encode_image(prepared(clip, pictures()), normalize=False)
    torch.testing.assert_close(read_images(clip, pictures(), FEATURES), expected)


def test_half_precision_on_disk_is_near(tiny: FrozenClip, cache: Path) -> None:
    full = read_images(tiny, pictures(), FEATURES)
    half = read_images(tiny, pictures(), FEATURES, dtype="float16")
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), full, atol=1e-4, rtol=1e-3)
    small, large = sorted(path.stat().st_size for path in cache.glob("*.npy"))
    assert large - small == full.nbytes // 2


@pytest.mark.parametrize(("name", "grid"), [("vit", 2), ("rn", 2), ("vit-quickgelu", 2)])
def test_what_stands_for_the_whole_image_is_open_clips_feature(
    name: str, grid: int, tmp_path: Path
) -> None:
    model, path = make(name, tmp_path)
    clip = frozen_clip(f"made-{name}", path)
    pixels = prepared(clip, pictures())
    with torch.no_grad():
        positions = project_positions(model.visual, pixels)
        torch.testing.assert_close(positions[:, 0], model.encode_image(pixels))
    tokens = read_images(clip, pictures(), TOKENS)
    assert tokens.shape == (5, 1 + grid * grid, 64)
    torch.testing.assert_close(tokens, positions)
    torch.testing.assert_close(tokens[:, 0], read_images(clip, pictures(), FEATURES))
    assert not torch.allclose(tokens[:, 1], tokens[:, 2])


def test_a_vits_tokens_are_its_own_output_projected(tmp_path: Path) -> None:
    model, path = make("vit", tmp_path)
    clip = frozen_clip("made-vit", path)
    model.visual.output_tokens = True
    with torch.no_grad():
        _, tokens = model.visual(prepared(clip, pictures()))
        expected = tokens @ model.visual.proj
    torch.testing.assert_close(read_images(clip, pictures(), TOKENS)[:, 1:], expected)


def test_a_resnets_token_is_what_its_pool_answers_to_that_position(tmp_path: Path) -> None:
    model, path = make("rn", tmp_path)
    clip = frozen_clip("made-rn", path)
    pool, seen = model.visual.attnpool, []
    pool.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model.encode_image(prepared(clip, pictures()))
        x = seen[0].flatten(2).permute(2, 0, 1)
        x = torch.cat([x.mean(0, keepdim=True), x]) + pool.positional_embedding[:, None]
        attention = torch.nn.MultiheadAttention(x.shape[-1], pool.num_heads)
        projections = (pool.q_proj, pool.k_proj, pool.v_proj)
        attention.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
        attention.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
        attention.out_proj = pool.c_proj
        expected = attention(x, x, x)[0].transpose(0, 1)
    torch.testing.assert_close(read_images(clip, pictures(), TOKENS), expected)


def test_what_cannot_be_read_is_said(cache: Path, tmp_path: Path) -> None:
    _, path = make("coca", tmp_path)
    clip = frozen_clip("made-coca", path)
    with pytest.raises(UsageError, match="patch tokens"):
        read_images(clip, pictures(), TOKENS)
    with pytest.raises(UsageError, match="patch tokens"):
        read_shape(clip, TOKENS)
    assert not list(cache.glob("*.tmp"))


def test_pixels_are_the_towers_input_and_need_no_tower(
    tiny: FrozenClip, cache: Path, towers: list[weakref.ref[Any]], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="flwr.pfedmoap"):
        pixels = read_images(tiny, pictures(), PIXELS)
    assert torch.equal(pixels, prepared(tiny, pictures()))
    assert "image tower" not in caplog.text
    (path,) = cache.glob("*.npy")
    before = path.stat().st_mtime_ns
    assert torch.equal(read_images(tiny, pictures(), PIXELS), pixels)
    assert path.stat().st_mtime_ns == before
    assert read_images(tiny, pictures(), Reading("pixels", views=2)).shape == (5, 2, 3, 16, 16)
    assert towers == []


@pytest.mark.parametrize("kind", ["features", "tokens", "pixels"])
@pytest.mark.parametrize("views", [0, 2])
def test_the_shape_is_known_before_anything_is_read(
    kind: Any, views: int, tiny: FrozenClip
) -> None:
    reading = Reading(kind, views)
    assert read_shape(tiny, reading) == read_images(tiny, pictures(), reading).shape[1:]


def test_of_no_image_nothing_is_read(tiny: FrozenClip, cache: Path) -> None:
    assert len(read_images(tiny, pictures().select([]), FEATURES)) == 0
    assert not cache.exists()


# Views


def test_views_differ_and_are_the_same_again(
    tiny: FrozenClip, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    state = torch.get_rng_state()
    views = read_images(tiny, pictures(), Reading("features", views=3))
    assert torch.equal(torch.get_rng_state(), state)
    assert views.shape == (5, 3, 64)
    assert len({tuple(view.tolist()) for view in views.flatten(0, 1)}) == 15
    torch.manual_seed(123)
    monkeypatch.setenv("PFEDMOAP_CACHE", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(features, "BATCH", 4)
    torch.testing.assert_close(read_images(tiny, pictures(), Reading("features", views=3)), views)


def test_a_view_depends_on_its_number_not_on_how_many_there_are(tiny: FrozenClip) -> None:
    few = read_images(tiny, pictures(), Reading("features", views=1))
    many = read_images(tiny, pictures(), Reading("features", views=3))
    torch.testing.assert_close(few[:, 0], many[:, 0])


def test_equal_images_have_different_views(tiny: FrozenClip) -> None:
    twice = datasets.concatenate_datasets([pictures(1), pictures(1)])
    one, other = read_images(tiny, twice, Reading("features", views=1))
    assert not torch.allclose(one, other)


def test_tokens_have_views_too(tiny: FrozenClip) -> None:
    assert read_images(tiny, pictures(), Reading("tokens", views=2)).shape == (5, 2, 5, 64)


def test_views_are_for_training_images_only(tiny: FrozenClip, cache: Path) -> None:
    splits = {"train": pictures(4), "validation": pictures(3), "test": pictures(2)}
    splits["empty"] = pictures().select([])
    reading = Reading(views=2)
    found = {split: tuple(read.shape) for split, read in read_splits(tiny, splits, reading).items()}
    expected = {"train": (4, 2, 64), "validation": (3, 64), "test": (2, 64), "empty": (0,)}
    assert found == expected
    files = feature_files(tiny, splits, reading)
    assert list(files) == ["train", "validation", "test"]
    assert sorted(files.values()) == sorted(cache.glob("*.npy"))


# Once


def test_the_tower_is_freed_and_never_loaded_again(
    tiny: FrozenClip,
    towers: list[weakref.ref[Any]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, logger="flwr.pfedmoap"):
        first = read_images(tiny, pictures(), FEATURES)
    assert [tower() for tower in towers] == [None]
    (began, ended) = [record.getMessage() for record in caplog.records]
    assert began.startswith("reading images")
    assert all(word in ended for word in ("5 images", "MB kept in", "free again"))
    monkeypatch.setattr("pfedmoap_flwr.clip.load.load_full_model", None)
    monkeypatch.setattr("pfedmoap_flwr.clip.weights.load_full_model", None)
    load.forget_clip()
    fresh = frozen_clip()
    assert torch.equal(first, read_images(fresh, pictures(), FEATURES))
    assert len(towers) == 1


def test_a_tower_that_someone_still_holds_takes_no_memory(tiny: FrozenClip) -> None:
    with tiny.image_tower() as tower:
        assert {p.device.type for p in tower.parameters()} == {"cpu"}
        assert not any(p.requires_grad for p in tower.parameters())
        assert not tower.training
    assert {t.device.type for t in tower.state_dict().values()} == {"meta"}


def test_a_bar_is_shown_on_a_terminal_only(
    tiny: FrozenClip, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    read_images(tiny, pictures(), FEATURES)
    assert capfd.readouterr().out == ""
    monkeypatch.setenv("FORCE_COLOR", "1")
    read_images(tiny, pictures(6), FEATURES)
    shown = capfd.readouterr()
    assert "6/6" in shown.err
    assert shown.out == ""


def mapped(array: np.ndarray | Tensor) -> list[str]:
    """The file that holds the memory of an array, from the kernel's own table."""
    address = array.data_ptr() if isinstance(array, Tensor) else array.ctypes.data
    lines = Path("/proc/self/maps").read_text().splitlines()
    found = []
    for line in lines:
        start, end = (int(n, 16) for n in line.split()[0].split("-"))
        if start <= address < end:
            found += line.split()[5:]
    return found


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_features_are_mapped_not_loaded(tiny: FrozenClip, cache: Path) -> None:
    one, other = (read_images(tiny, pictures(), FEATURES) for _ in range(2))
    (path,) = cache.glob("*.npy")
    assert mapped(one) == mapped(other) == [str(path)]
    before = path.read_bytes()
    one.zero_()
    assert path.read_bytes() == before
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    "change", ["images", "order", "weights", "preprocessing", "kind", "views", "dtype", "model"]
)
def test_whatever_else_is_asked_for_is_computed_anew(
    change: str, tiny: FrozenClip, cache: Path, tmp_path: Path
) -> None:
    read_images(tiny, pictures(), FEATURES)
    other, images, reading, dtype = tiny, pictures(), FEATURES, "float32"
    if change == "images":
        images = pictures(seed=2)
    elif change == "order":
        images = images.select([1, 0, 2, 3, 4])
    elif change == "weights":
        path = tmp_path / "w.safetensors"
        path.write_bytes(asset("clip/tiny.safetensors").read_bytes()[:-1] + b"\x01")
        other = frozen_clip("tiny", path)
    elif change == "preprocessing":
        other = replace(tiny, preprocessing=replace(tiny.preprocessing, mean=(0.5, 0.5, 0.5)))
    elif change == "model":
        other = replace(tiny)
        other.config["vision_cfg"]["pool_type"] = "avg"
    elif change == "dtype":
        dtype = "float16"
    else:
        reading = {"kind": TOKENS, "views": Reading(views=1)}[change]
    read_images(other, images, reading, dtype)  # type: ignore[arg-type]
    assert len(list(cache.glob("*.npy"))) == 2


def _read_elsewhere(cache: str) -> tuple[np.ndarray, int]:
    os.environ["PFEDMOAP_CACHE"] = cache
    computed = []

    def counting(*args: Any) -> Tensor:
        computed.append(1)
        time.sleep(0.2)
        return encode_image(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "encode_image", counting)
        read = read_images(frozen_clip(), pictures(), FEATURES)
    return read.numpy().copy(), len(computed)


@pytest.mark.processes
def test_of_processes_that_start_at_once_one_computes(cache: Path) -> None:
    with ProcessPoolExecutor(4, multiprocessing.get_context("fork")) as pool:
        read = list(pool.map(_read_elsewhere, [str(cache)] * 4))
    assert all((found == read[0][0]).all() for found, _ in read)
    assert sum(times for _, times in read) == 1
    assert len(list(cache.glob("*.npy"))) == 1
    assert not list(cache.glob("*.tmp"))


def test_a_stopped_pass_over_images_gives_the_same_bytes(
    tiny: FrozenClip, cache: Path, monkeypatch: pytest.MonkeyPatch, towers: list[weakref.ref[Any]]
) -> None:
    monkeypatch.setattr(features, "BATCH", 2)
    calls = iter([True, False])

    def stopped(*args: Any) -> Tensor:
        if next(calls):
            return encode_image(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(features, "encode_image", stopped)
    with pytest.raises(KeyboardInterrupt):
        read_images(tiny, pictures(), FEATURES)
    assert [tower() for tower in towers] == [None]
    monkeypatch.setattr(features, "encode_image", encode_image)
    resumed = read_images(tiny, pictures(), FEATURES)
    for path in cache.glob("*.npy"):
        path.unlink()
    assert torch.equal(read_images(tiny, pictures(), FEATURES), resumed)


def test_weights_that_vanished_are_said(tmp_path: Path) -> None:
    _, path = make("vit", tmp_path)
    clip = frozen_clip("made-vit", path)
    assert clip.checkpoint_digest
    path.unlink()
    with pytest.raises(UsageError, match="could not be loaded"):
        read_images(clip, pictures(), FEATURES)
