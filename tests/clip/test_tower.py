"""The live image tower: open_clip's own forward, with prompts of Visual Prompt Tuning inside."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.utils import to_2tuple
from torch import Tensor, nn

from pfedmoap_flwr.assets import asset
from pfedmoap_flwr.clip import load
from pfedmoap_flwr.clip.load import FrozenClip
from pfedmoap_flwr.clip.tower import ImageTower
from pfedmoap_flwr.clip.weights import load_full_model
from pfedmoap_flwr.errors import UsageError
from support.models import MADE, VIT, make, whole
from support.tiny import frozen_clip

# Three blocks, and weights that tell one token from another
DEEP = {**MADE["vit"], "vision_cfg": {**VIT, "layers": 3}}
AVERAGE = {**DEEP, "vision_cfg": {**DEEP["vision_cfg"], "pool_type": "avg"}}
P, WIDTH = 4, 64


@pytest.fixture(scope="module", params=[DEEP, AVERAGE], ids=["class-token", "average"])
def tower(request: pytest.FixtureRequest) -> ImageTower:
    return ImageTower(visual_of(request.param), "made")


def visual_of(config: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    visual = open_clip.CLIP(**config).visual
    with torch.no_grad():
        for parameter in visual.transformer.parameters():
            parameter.mul_(3)
    return visual


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


PIXELS = draw(5, 3, 16, 16)


def by_hooks(visual: Any, pixels: Tensor, prompts: Tensor) -> Tensor:
    """The features by hooks around open_clip's blocks: prompts go in before, and out at the end."""
    deep = prompts if prompts.dim() == 3 else prompts[None]
    blocks = list(visual.transformer.resblocks)

    def insert(number: int) -> Callable[..., Any]:
        def hook(block: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
            rows = []
            for tokens in inputs[0]:
                old = 0 if number == 0 else deep.shape[1]
                rows.append(torch.cat([tokens[:1], deep[number], tokens[1 + old :]]))
            return (torch.stack(rows), *inputs[1:])

        return hook

    def drop(block: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        kept = [n for n in range(output.shape[1]) if not 1 <= n < 1 + deep.shape[1]]
        return output[:, kept]

    handles = [blocks[n].register_forward_pre_hook(insert(n)) for n in range(len(deep))]
    handles.append(blocks[-1].register_forward_hook(drop))
    try:
        found: Tensor = visual(pixels)
        return found
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", [*MADE, "tiny", "mini"])
def test_without_prompts_it_is_open_clips_own(name: str, tmp_path: Path) -> None:
    if name in MADE:
        full, path = make(name, tmp_path)
        clip = frozen_clip(f"made-{name}", path)
    else:
        path = asset(f"clip/{name}.safetensors")
        open_clip.add_model_config(path.parent)
        full, clip = whole(name, path), frozen_clip(name, path)
    pixels = draw(3, 3, *to_2tuple(full.visual.image_size))
    with torch.no_grad():
        expected = full.encode_image(pixels, normalize=False)
        assert torch.equal(clip.tower.encode(pixels), expected)


SHAPES = [(P, WIDTH), (1, P, WIDTH), (2, P, WIDTH), (3, P, WIDTH), (3, 1, WIDTH)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@every_shape
def test_prompts_are_what_hooks_make_of_them(tower: ImageTower, shape: tuple[int, ...]) -> None:
    prompts = draw(*shape, seed=1)
    found = tower.encode(PIXELS, prompts)
    torch.testing.assert_close(found, by_hooks(tower.visual, PIXELS, prompts))
    assert (found - tower.encode(PIXELS)).norm(dim=-1).min() > 0.01


def test_shallow_prompts_are_deep_ones_of_one_block(tower: ImageTower) -> None:
    prompts = draw(P, WIDTH)
    assert torch.equal(tower.encode(PIXELS, prompts), tower.encode(PIXELS, prompts[None]))


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_every_image_can_have_its_own_prompts(tower: ImageTower, layers: int) -> None:
    prompts = draw(5, layers, P, WIDTH, seed=1).requires_grad_()
    found = tower.encode(PIXELS, prompts)
    pairs = zip(PIXELS, prompts, strict=True)
    alone = torch.cat([by_hooks(tower.visual, image[None], own) for image, own in pairs])
    # Several images are multiplied at once, which some processors round otherwise: 1.3e-5 was seen
    torch.testing.assert_close(found, alone, atol=5e-5, rtol=1e-5)
    # An image's feature moves its own prompts alone
    (gradient,) = torch.autograd.grad(found[2].sum(), prompts)
    assert [bool(own.any()) for own in gradient] == [False, False, True, False, False]


def test_fresh_prompts_replace_those_of_the_block_before(tower: ImageTower) -> None:
    prompts = draw(3, P, WIDTH)
    visual: Any = tower.visual
    seen: list[Tensor] = []
    handles = [
        block.register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0]))
        for block in visual.transformer.resblocks
    ]
    tower.encode(PIXELS, prompts)
    for handle in handles:
        handle.remove()
    for number, tokens in enumerate(seen):
        assert tokens.shape == (5, 1 + P + 4, WIDTH)
        assert all(torch.equal(of_image, prompts[number]) for of_image in tokens[:, 1 : 1 + P])


def test_no_prompts_at_all_change_nothing(tower: ImageTower) -> None:
    found = tower.encode(PIXELS, torch.empty(2, 0, WIDTH))
    torch.testing.assert_close(found, tower.encode(PIXELS))


@every_shape
def test_gradients_reach_pixels_and_prompts_and_no_weight(
    tower: ImageTower, shape: tuple[int, ...]
) -> None:
    prompts = (0.1 * draw(*shape, seed=1)).requires_grad_()
    pixels = PIXELS.clone().requires_grad_()
    target = draw(5, 64, seed=2)
    before = {name: tensor.clone() for name, tensor in tower.visual.state_dict().items()}
    (tower.encode(pixels, prompts) * target).sum().backward()
    assert prompts.grad is not None
    assert pixels.grad is not None
    # Every prompt of every block moves the loss
    assert prompts.grad.flatten(0, -2).norm(dim=-1).min() > 0
    assert pixels.grad.flatten(1).norm(dim=-1).min() > 0
    assert all(weight.grad is None for weight in tower.visual.parameters())
    assert all(torch.equal(t, before[n]) for n, t in tower.visual.state_dict().items())


@every_shape
def test_gradients_are_those_of_small_steps(shape: tuple[int, ...]) -> None:
    tower = ImageTower(visual_of(DEEP).double(), "made")
    inputs = [PIXELS[:2].double().requires_grad_(), draw(*shape).double().requires_grad_()]
    assert torch.autograd.gradcheck(tower.encode, inputs, fast_mode=True)


@pytest.mark.parametrize("prompts", [None, draw(P, WIDTH), draw(3, P, WIDTH)])
def test_an_image_does_not_depend_on_its_company(tower: ImageTower, prompts: Tensor | None) -> None:
    together = tower.encode(PIXELS, prompts)
    alone = torch.cat([tower.encode(image[None], prompts) for image in PIXELS])
    torch.testing.assert_close(together, alone)


def test_a_resnets_features_do_not_depend_on_their_company(tmp_path: Path) -> None:
    _, path = make("rn", tmp_path)
    tower = frozen_clip("made-rn", path).tower
    pixels = draw(4, 3, 64, 64).requires_grad_()
    together = tower.encode(pixels)
    torch.testing.assert_close(together, torch.cat([tower.encode(p[None]) for p in pixels]))
    (gradient,) = torch.autograd.grad(together.square().sum(), pixels)
    assert gradient.flatten(1).norm(dim=1).min() > 0


def test_heads_side_by_side_have_their_own_prompts() -> None:
    tower = ImageTower(visual_of(DEEP).double(), "made")
    prompts, pixels = draw(2, 3, P, WIDTH).double(), draw(2, 5, 3, 16, 16).double()

    def loss(pixels: Tensor, prompts: Tensor) -> Tensor:
        return tower.encode(pixels, prompts).square().sum()

    stacked = torch.func.vmap(torch.func.grad(loss, (0, 1)))(pixels, prompts)
    for number in range(2):
        alone = torch.func.grad(loss, (0, 1))(pixels[number], prompts[number])
        torch.testing.assert_close(tuple(each[number] for each in stacked), alone)


# Once, and only where it is asked for


@pytest.fixture
def tiny() -> FrozenClip:
    return frozen_clip()


def test_the_tower_is_loaded_when_asked_for_and_once(
    tiny: FrozenClip, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []

    def counted(*arguments: Any) -> Any:
        loaded.append(arguments)
        return load_full_model(*arguments)

    monkeypatch.setattr(load, "load_full_model", counted)
    load.forget_clip()
    clip = frozen_clip()
    assert loaded == []
    assert clip.tower is clip.tower
    assert len(loaded) == 1
    assert not clip.tower.visual.training
    assert not any(p.requires_grad for p in clip.tower.visual.parameters())
    assert (clip.tower.width, clip.tower.layers) == (64, 1)


def test_a_tower_gives_a_head_no_parameters(tiny: FrozenClip) -> None:
    head: Any = nn.Module()
    head.tower = tiny.tower
    assert list(head.parameters()) == list(head.state_dict()) == []


@pytest.mark.parametrize("ask", ["width", "layers", "encode"])
def test_a_tower_without_a_place_for_prompts_says_so(ask: str, tmp_path: Path) -> None:
    _, path = make("rn", tmp_path)
    tower = frozen_clip("made-rn", path).tower
    asked: dict[str, Callable[[], Any]] = {
        "width": lambda: tower.width,
        "layers": lambda: tower.layers,
        "encode": lambda: tower.encode(draw(1, 3, 64, 64), draw(P, WIDTH)),
    }
    with pytest.raises(UsageError, match=r"clip\.model=made-rn: .*ModifiedResNet.* use a ViT"):
        asked[ask]()


@pytest.mark.parametrize(
    "shape", [(WIDTH,), (P, 32), (4, P, WIDTH), (0, P, WIDTH), (1, 1, P, 64), (5, 4, P, 64)]
)
def test_prompts_of_another_shape_are_refused(tower: ImageTower, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"it must be \(P, 64\), or \(L, P, 64\) with L from 1"):
        tower.encode(PIXELS, torch.zeros(shape))


def test_a_tower_whose_weights_vanished_says_so(tmp_path: Path) -> None:
    _, path = make("vit", tmp_path)
    clip = frozen_clip("made-vit", path)
    path.unlink()
    with pytest.raises(UsageError, match="could not be loaded"):
        clip.tower  # noqa: B018
