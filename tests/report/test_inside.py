"""pfedmoap inspect of any method: words, distances, the plane; against numbers made another way."""

import builtins
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist

from pfedmoap_flwr import methods
from pfedmoap_flwr.cli.main import main
from pfedmoap_flwr.clip.words import embed_words, nearest_words
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.parts.pool import spread
from pfedmoap_flwr.report.inside import in_a_plane
from pfedmoap_flwr.runs.find_model import RunModels
from pfedmoap_flwr.runs.folder import RunFolder
from pfedmoap_flwr.runs.insight import near_words, text_features
from support.federation import kept_head
from support.tiny import CLASSNAMES, NUM_CLIENTS, frozen_clip

TWO: dict[str, Any] = {"num_server_rounds": 2, "local_epochs": 1}
START = {"prompt.ctx-init": "a photo of"}


def test_the_words_nearest_to_words_are_these_words() -> None:
    clip = frozen_clip()
    vectors = embed_words(clip.model, clip.tokenizer, "a photo of")
    found = nearest_words(clip.model, clip.tokenizer, vectors, 2)
    assert [near[0] for near in found] == [("a", 0.0), ("photo", 0.0), ("of", 0.0)]
    table = clip.model.token_embedding.weight.detach().double().numpy()
    apart = np.sort(np.linalg.norm(table - vectors[1].double().numpy(), axis=1))
    assert found[1][1][1] == pytest.approx(apart[1], rel=1e-5)


def test_a_prompt_that_starts_from_words_and_does_not_move_is_near_them(
    reference: Callable[..., RunFolder],
) -> None:
    run = reference(method="promptfl", lr=1e-9, **START, **TWO)
    found = near_words(RunModels(run.path).of(1), 3)
    assert [near.word for near in found if near.rank == 1] == ["a", "photo", "of"]
    assert {(near.prompt, near.part) for near in found} == {("ctx", "")}
    assert [near.rank for near in found] == [1, 2, 3] * 3


@pytest.mark.parametrize(
    ("method", "options", "prompts"),
    [
        ("fedotp", {}, {("ctx", ""), ("local", "")}),
        ("fedjets", {"fedjets.num-experts": 2}, {("experts.0", ""), ("experts.1", "")}),
        ("coop", {"prompt.class-specific": True}, {("ctx", name) for name in CLASSNAMES}),
        ("promptfl", {"prompt.reparametrise": "mlp"}, {("ctx", "")}),
        ("promptfl", {"prompt.depth": 2}, {("ctx", "")}),
    ],
)
def test_every_prompt_of_a_head_is_read(
    method: str, options: Any, prompts: Any, reference: Callable[..., RunFolder]
) -> None:
    run = reference(method=method, **options, **TWO)
    found = near_words(RunModels(run.path).of(0), 1)
    assert {(near.prompt, near.part) for near in found} == prompts
    assert len(found) == 4 * len(prompts)


def test_spread_is_the_root_mean_square_of_all_distances() -> None:
    pool = {i: torch.randn(4, 8) for i in range(7)}
    flat = torch.stack(list(pool.values())).flatten(1).numpy()
    assert spread(pool) == pytest.approx(np.sqrt((pdist(flat) ** 2).mean()), rel=1e-5)
    assert spread({3: pool[3]}) == spread({}) == 0


def test_rounds_say_how_far_prompts_are_apart(reference: Callable[..., RunFolder]) -> None:
    run = reference(method="pfedmoap", lr=0.5, **TWO)
    for record in run.rounds()[1:]:
        kept = [kept_head(run, i, after=record.round)["ctx"] for i in range(NUM_CLIENTS)]
        flat = torch.stack(kept).flatten(1).numpy()
        expected = np.sqrt((pdist(flat) ** 2).mean())
        assert record.metrics["pool-distance"] == pytest.approx(expected, rel=1e-4)


def test_a_plane_keeps_the_distances_of_what_lies_in_one() -> None:
    rng = np.random.default_rng(0)
    flat = rng.normal(size=(20, 2))
    turn, _ = np.linalg.qr(rng.normal(size=(6, 2)))
    np.testing.assert_allclose(pdist(in_a_plane(flat @ turn.T, "pca")), pdist(flat))
    assert in_a_plane(rng.normal(size=(20, 6)), "t-sne").shape == (20, 2)
    assert in_a_plane(rng.normal(size=(1, 6)), "t-sne").shape == (1, 2)


@pytest.mark.parametrize("method", methods.names())
def test_inspect_of_every_method_draws_or_says_why_not(
    method: str,
    reference: Callable[..., RunFolder],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, figure = reference(method=method, lr=0.5, **TWO), tmp_path / "inside.svg"
    status = main(["inspect", str(run.path), "--figure", str(figure)])
    said = capsys.readouterr()
    if status:
        assert status == 2
        assert said.err == f"pfedmoap: --figure {figure}: {method} has nothing to draw\n"
    else:
        assert figure.stat().st_size > 1000
    features = text_features(RunModels(run.path).of(0))
    assert (features is not None) == (status == 0)


def test_one_client_more_closely(
    reference: Callable[..., RunFolder], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, figure = reference(method="pfedmoap", lr=0.5, **TWO), tmp_path / "inside.png"
    words = ["--client", "3", "--figure", str(figure), "--projection", "t-sne"]
    assert main(["inspect", str(run.path), *words]) == 0
    printed = capsys.readouterr().out
    for owner in run.rounds()[-1].lent[3]:
        assert f"client {owner}" in printed
    assert "distance of two prompts in the pool, by round: 1: " in printed
    assert any(name in printed for name in CLASSNAMES)
    assert near_words(RunModels(run.path).of(3), 1)[0].word in printed
    assert figure.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--client", "4"], "--client 4: this run has clients 0 to 3"),
        (["--projection", "umap"], "--projection umap: must be pca or t-sne"),
        (["--figure", "a.pdf"], "must end with .png or .svg"),
    ],
)
def test_wrong_use_is_one_line(
    words: list[str],
    said: str,
    reference: Callable[..., RunFolder],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = reference(method="pfedmoap", lr=0.5, **TWO)
    assert main(["inspect", str(run.path), *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_without_scikit_learn_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return found(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"pip install 'pfedmoap-flwr\[inspect\]'"):
        in_a_plane(np.zeros((5, 3)), "pca")
