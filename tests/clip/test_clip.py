"""The frozen model: weights by name, by file and by tag; its text tower alone, unchanged."""

from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip import pretrained
from safetensors.torch import load_file, save_file

from pfedmoap_flwr.assets import asset
from pfedmoap_flwr.cli.main import main
from pfedmoap_flwr.clip import weights
from pfedmoap_flwr.clip.load import FrozenClip, load_clip, resolve_device
from pfedmoap_flwr.clip.settings import ClipSettings
from pfedmoap_flwr.clip.weights import find_weights
from pfedmoap_flwr.data.images import load_images
from pfedmoap_flwr.errors import UsageError
from support.models import MADE, make, whole
from support.texts import layout
from support.tiny import frozen_clip


@pytest.fixture(scope="module")
def tiny() -> FrozenClip:
    return frozen_clip()


def test_zeroshot_text_is_open_clips_own(tiny: FrozenClip) -> None:
    names = ("red panda", "snow_owl")
    tokens = open_clip.get_tokenizer("tiny")(["a photo of a red panda.", "a photo of a snow owl."])
    full = whole("tiny", asset("clip/tiny.safetensors"))
    with torch.no_grad():
        expected = full.encode_text(tokens, normalize=True)
    torch.testing.assert_close(tiny.zeroshot(names, "a photo of a {}."), expected)


TEXTS = ["a photo of a red panda.", "snow", "a drawing of a green tree frog."]


@pytest.mark.parametrize("name", [*MADE, "tiny", "mini"])
def test_text_features_are_bitwise_those_of_the_whole_model(name: str, tmp_path: Path) -> None:
    if name in MADE:
        full, path = make(name, tmp_path)
        clip = frozen_clip(f"made-{name}", path)
    else:
        path = asset(f"clip/{name}.safetensors")
        open_clip.add_model_config(path.parent)
        full, clip = whole(name, path), frozen_clip(name, path)
    assert not hasattr(clip.model, "visual")
    tokens = clip.tokenizer(TEXTS)
    with torch.no_grad():
        assert torch.equal(clip.model.encode_text(tokens), full.encode_text(tokens))
    assert clip.logit_scale == float(full.logit_scale.exp())
    kept = {n: t for n, t in full.state_dict().items() if not n.startswith("visual.")}
    assert clip.model.state_dict().keys() == kept.keys()


@pytest.mark.parametrize("name", ["vit", "rn-custom", "coca"])
def test_images_are_prepared_as_by_open_clip(name: str, tmp_path: Path) -> None:
    _, path = make(name, tmp_path)
    _, _, expected = open_clip.create_model_and_transforms(f"made-{name}", str(path))
    assert repr(frozen_clip(f"made-{name}", path).preprocess) == repr(expected)


def test_only_the_text_part_of_a_checkpoint_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path = make("vit", tmp_path)
    for reader in ("load_full_model", "load_state_dict"):
        monkeypatch.setattr(weights, reader, None)
    clip = frozen_clip("made-vit", path)
    parameters = sum(p.numel() for p in clip.model.parameters())
    assert parameters == sum(
        tensor.numel() for n, tensor in load_file(path).items() if not n.startswith("visual.")
    )


@pytest.mark.parametrize("kind", ["pt", "old names", "other size of logit_scale"])
def test_other_checkpoints_load_as_with_open_clip(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "vit-custom" if kind == "old names" else "vit"
    _, path = make(name, tmp_path)
    content = load_file(path)
    if kind == "pt":
        path = tmp_path / "weights.pt"
        torch.save({"state_dict": {f"module.{n}": t for n, t in content.items()}}, path)
    else:
        if kind == "old names":
            content = {n.removeprefix("text."): tensor for n, tensor in content.items()}
        else:
            content["logit_scale"] = content["logit_scale"].reshape(1)
        path = tmp_path / "other.safetensors"
        save_file(content, path)
    full = whole(f"made-{name}", path)
    if kind != "other size of logit_scale":
        monkeypatch.setattr(weights, "load_full_model", None)
    clip = frozen_clip(f"made-{name}", path)
    tokens = clip.tokenizer(TEXTS)
    with torch.no_grad():
        assert torch.equal(clip.model.encode_text(tokens), full.encode_text(tokens))


def test_published_weights_bring_their_preprocessing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path = make("vit", tmp_path)
    published = {"file": str(path), "mean": (0.5,) * 3, "std": (0.25,) * 3, "resize_mode": "squash"}
    monkeypatch.setitem(pretrained._PRETRAINED, "made-vit", {"ours": published})
    clip = frozen_clip("made-vit", "ours")
    _, _, expected = open_clip.create_model_and_transforms("made-vit", "ours")
    assert clip.checkpoint == path
    assert repr(clip.preprocess) == repr(expected)
    assert "0.25" in repr(expected)


def test_the_fingerprint_sees_weights_and_preprocessing(tiny: FrozenClip) -> None:
    other = open_clip.create_model("tiny").eval()
    del other.visual
    assert replace(tiny, model=other).fingerprint != tiny.fingerprint
    prepared = replace(tiny.preprocessing, size=24)
    assert replace(tiny, preprocessing=prepared).fingerprint != tiny.fingerprint
    assert replace(tiny).fingerprint == tiny.fingerprint


def test_weights_load_from_a_path_as_from_a_name(tiny: FrozenClip, tmp_path: Path) -> None:
    copy = tmp_path / "weights.safetensors"
    copy.write_bytes(asset("clip/tiny.safetensors").read_bytes())
    assert frozen_clip("tiny", copy).fingerprint == tiny.fingerprint


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

    # The hub answers, and then no more
    monkeypatch.setattr(weights, "get_hf_file_metadata", lambda url, timeout: None)
    monkeypatch.setattr(weights, "download_pretrained", refuse)
    with pytest.raises(UsageError, match=r"no route to host.*clip\.pretrained=/path") as raised:
        frozen_clip("RN50-quickgelu", "openai")
    assert "\n" not in str(raised.value)


def test_torn_weights_are_said(tmp_path: Path) -> None:
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(asset("clip/tiny.safetensors").read_bytes()[:1000])
    with pytest.raises(UsageError, match="could not be loaded"):
        frozen_clip("tiny", torn)


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
        tiny.encoder((("red panda",),), layout(40), False)


def test_bfloat16_is_close_and_gives_float32(tiny: FrozenClip) -> None:
    low = frozen_clip(precision="bfloat16")
    names = (("red panda",), ("snow_owl",))
    ctx = (0.1 * torch.randn(4, 32, generator=torch.Generator().manual_seed(0))).requires_grad_()
    target = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    features, gradients = [], []
    for clip in (tiny, low):
        features.append(clip.encoder(names, layout(4), False)(ctx))
        gradients.append(torch.autograd.grad((features[-1] * target).sum(), ctx)[0].flatten())
    assert features[1].dtype == gradients[1].dtype == torch.float32
    assert not torch.equal(features[0], features[1])
    torch.testing.assert_close(features[1], features[0], rtol=0, atol=0.02)
    assert torch.cosine_similarity(gradients[0], gradients[1], dim=0) > 0.999


def test_one_model_serves_a_process() -> None:
    same = [frozen_clip(precision=precision) for precision in ("auto", "float32")]
    if not torch.cuda.is_available():
        same.append(load_clip(ClipSettings(model="tiny", pretrained="tiny")))
    assert {id(clip) for clip in same} == {id(frozen_clip())}


def test_weights_that_are_out_of_reach_are_asked_for_once_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def silent(url: str, *, timeout: float) -> None:
        asked.append(timeout)
        raise TimeoutError("timed out")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(weights, "get_hf_file_metadata", silent)
    monkeypatch.setattr(weights, "download_pretrained", lambda published: pytest.fail("downloads"))
    words = ["clip.model=ViT-B-32-quickgelu", "clip.pretrained=openai"]
    assert main(["run", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pfedmoap: weights 'openai' for ViT-B-32-quickgelu could not be loaded")
    assert error.count("\n") == 1
    assert asked == [weights.SECONDS]
    assert not list(tmp_path.iterdir())
