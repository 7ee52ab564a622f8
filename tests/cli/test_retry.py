"""--retry: a run that fails goes on from its last whole round, so many times."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pfedmoap_flwr.cli import main as cli
from pfedmoap_flwr.errors import RunFailed
from pfedmoap_flwr.federation.strategy import PromptStrategy
from pfedmoap_flwr.methods.base import Method
from pfedmoap_flwr.runs.folder import RunFolder
from support.federation import assert_same
from support.tiny import TINY

Run = Callable[..., int]
Fail = Callable[[str, int, int], None]
SHORT = {"method": "promptfl", "local-epochs": 1, "num-server-rounds": 3}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run the command in tmp_path/run, and return its status."""
    words = [f"{key}={value}" for key, value in {**TINY, **SHORT}.items()]
    return lambda *more: cli.main(["run", *more, *words, f"run-dir={tmp_path / 'run'}"])


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Fail:
    """Let a step of the server fail so often, in a round."""

    def fail(step: str, server_round: int, times: int) -> None:
        owner: Any = Method if step == "merge" else PromptStrategy
        whole, left = getattr(owner, step), [times]

        def fragile(self: Any, first: Any, *more: Any) -> Any:
            number = first.round + 1 if step == "merge" else first
            if number == server_round and left[0]:
                left[0] -= 1
                raise RunFailed("power cut")
            return whole(self, first, *more)

        monkeypatch.setattr(owner, step, fragile)

    return fail


@pytest.mark.parametrize(
    ("step", "server_round", "times"),
    [("merge", 2, 2), ("aggregate_evaluate", 0, 1)],
    ids=["twice in a round", "before the first checkpoint"],
)
def test_a_run_that_fails_goes_on_and_leaves_what_a_whole_one_leaves(
    step: str,
    server_round: int,
    times: int,
    run: Run,
    fail: Fail,
    reference: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flat = {key.replace("-", "_"): value for key, value in SHORT.items()}
    whole = reference(**flat)
    fail(step, server_round, times)
    assert run("--retry", str(times)) == 0
    assert_same(RunFolder(tmp_path / "run"), whole)
    assert not (tmp_path / "run" / "error.txt").exists()
    said = capsys.readouterr().out
    assert said.count("the run failed: power cut") == times
    assert "attempts left after this one: 0" in said


def test_without_it_and_when_all_are_used_up_the_run_fails(
    run: Run, fail: Fail, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fail("merge", 2, 3)
    assert run("--retry", "1") == 1
    assert capsys.readouterr().err.startswith("power cut\n")
    assert cli.main(["run", f"resume={tmp_path / 'run'}"]) == 1
    assert len(RunFolder(tmp_path / "run").rounds()) == 2


def test_less_than_no_retry_is_wrong_use() -> None:
    assert cli.main(["run", "--retry", "-1"]) == 2
