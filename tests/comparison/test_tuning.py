"""A search has one budget for every method, looks at validation images alone, and goes on."""

import csv
from pathlib import Path
from typing import Any

import pytest

from pfedmoap_flwr import api, config
from pfedmoap_flwr.cli import words
from pfedmoap_flwr.cli.main import main
from pfedmoap_flwr.comparison import jobs, tuning
from pfedmoap_flwr.comparison.cells import Cell, grid
from pfedmoap_flwr.comparison.tuning import Budget, Trial, tune
from pfedmoap_flwr.errors import RunFailed, UsageError
from pfedmoap_flwr.runs.folder import RunFolder, load_settings
from pfedmoap_flwr.settings import Span
from support.tiny import TINY

pytest.importorskip("optuna")

SHORT: dict[str, Any] = {**TINY, "num-server-rounds": 1, "local-epochs": 1, "data.num-clients": 2}
LR = Span(0.0005, 0.05, True, False)
SEARCH: dict[str, Any] = {"lr": LR, "prompt.n-ctx": [2, 4], "pfedmoap.num-experts": [0, 2]}


def ignore(method: str, trial: Trial) -> None:
    """Tell nobody."""


def typed(out: Path, *more: str) -> list[str]:
    settings = [f"{key}={value}" for key, value in SHORT.items()]
    return ["tune", "coop,promptfl", "--trials", "3", "--out", str(out), *more, *settings]


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_method_has_the_same_trials_and_a_file_of_the_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search = ["--search", "lr=0.0005..0.05:log", "--search", "fedprox.mu=0.1,0.5"]
    assert main(typed(tmp_path / "out", *search)) == 0
    for method in ("coop", "promptfl"):
        rows = table(tmp_path / "out" / f"{method}.csv")
        assert [row["trial"] for row in rows] == ["0", "1", "2"]
        assert float(rows[0]["lr"]) == 0.002  # the default
        assert len({row["lr"] for row in rows}) == 3
        for row in rows:
            folder = tmp_path / "out" / method / f"trial-{int(row['trial']):03d}"
            assert load_settings(folder).lr == float(row["lr"])
            said = RunFolder(folder).summary()
            assert said["personal_validation_accuracy"] == float(row["value"])
            assert said["personal_accuracy"] is None  # no test image was measured
        best = max(rows, key=lambda row: float(row["value"]))
        chosen = config.parse_file(tmp_path / "out" / f"{method}.toml")
        assert chosen == {"method": method, "lr": float(best["lr"])}
    assert "best of 3 trials each" in capsys.readouterr().out


def test_a_search_that_was_stopped_goes_on_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = Budget(8, SHORT, {"lr": LR, "prompt.n-ctx": [2, 4]})
    straight = tune("coop", budget, tmp_path / "straight", ignore)
    execute, begun = api.execute, []

    def stopped(plan: Any) -> Any:
        begun.append(plan)
        if len(begun) == 7:
            raise KeyboardInterrupt
        return execute(plan)

    monkeypatch.setattr(api, "execute", stopped)
    with pytest.raises(KeyboardInterrupt):
        tune("coop", budget, tmp_path / "out", ignore)
    assert tune("coop", budget, tmp_path / "out", ignore) == straight
    assert len(begun) == 7 + 2
    # More trials than before leave the first ones as they are
    more = tune("coop", Budget(9, SHORT, budget.search), tmp_path / "out", ignore)
    assert more[:8] == straight
    assert len(begun) == 7 + 3


def test_the_search_learns_from_its_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a value that is highest at lr = 0.01, later trials lie nearer to it than first ones."""

    def made_up(cells: list[Cell], tell: Any) -> None:
        (cell,) = cells
        cell.folder.mkdir(parents=True)

    class Result:
        def __init__(self, lr: float) -> None:
            self.summary = {"personal_validation_accuracy": 1 - abs(lr - 0.01)}

    monkeypatch.setattr(jobs, "run_here", made_up)
    monkeypatch.setattr(Cell, "check", lambda self: None)
    monkeypatch.setattr(Cell, "result", lambda self: Result(self.values["lr"]))
    trials = tune("coop", Budget(40, SHORT, {"lr": LR}), tmp_path, ignore)
    away = [abs(float(trial.params["lr"]) - 0.01) for trial in trials]
    assert sorted(away[20:])[10] < sorted(away[1:20])[10]
    best = tuning.best_of(trials)
    assert best
    assert abs(float(best.params["lr"]) - 0.01) < 0.001


def test_a_trial_that_fails_is_told_and_the_search_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute, fails = api.execute, [False, True, False]

    def sometimes(plan: Any) -> Any:
        if fails.pop(0):
            raise RunFailed("the disk\nis full")
        return execute(plan)

    monkeypatch.setattr(api, "execute", sometimes)
    trials = tune("coop", Budget(3, SHORT, {"lr": LR}), tmp_path, ignore)
    assert [trial.reason for trial in trials] == ["", "is full", ""]
    assert [row["failed"] for row in table(tmp_path / "coop.csv")] == ["", "is full", ""]
    # What failed is tried again, and the same is tried
    fails += [False, False]
    again = tune("coop", Budget(3, SHORT, {"lr": LR}), tmp_path, ignore)
    assert [trial.reason for trial in again] == ["", "", ""]
    assert again[1].params == trials[1].params


def test_a_method_s_own_key_is_searched_for_it_alone(tmp_path: Path) -> None:
    budget = Budget(2, SHORT, {"lr": LR, "pfedmoap.num-experts": [0, 2]})
    assert tune("coop", budget, tmp_path, ignore)[0].params.keys() == {"lr"}
    with pytest.raises(UsageError, match="no setting of --search is one of coop's"):
        tune("coop", Budget(2, SHORT, {"fedprox.mu": [0.1]}), tmp_path, ignore)


def test_a_folder_of_another_search_is_refused(tmp_path: Path) -> None:
    tune("coop", Budget(1, SHORT, {"lr": LR}), tmp_path, ignore)
    with pytest.raises(UsageError, match=r"was run with lr=0\.002, which is not searched now"):
        tune("coop", Budget(1, SHORT, {"lr": [0.1, 0.2]}), tmp_path, ignore)
    with pytest.raises(UsageError, match="seed"):
        tune("coop", Budget(1, {**SHORT, "seed": 1}, {"lr": LR}), tmp_path, ignore)


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("lr=0.001..0.1:log", {"lr": Span(0.001, 0.1, True, False)}),
        ("pfedmoap.num-experts=0..9", {"pfedmoap.num-experts": Span(0, 9, False, True)}),
        ("prompt.n-ctx=4,16", {"prompt.n-ctx": [4, 16]}),
        ("prompt.calibrate=true,false", {"prompt.calibrate": [True, False]}),
    ],
)
def test_a_search_is_read(word: str, found: dict[str, Any]) -> None:
    assert words.read_search([word]) == found


@pytest.mark.parametrize(
    "bad",
    [
        ["lr=0.1..0.001"],
        ["lr=0.1..0.2:cubic"],
        ["pfedmoap.lambda=0..1:log"],
        ["lr=0.1..0.2", "lr=0.1,0.2"],
        ["lr=0.1..0.2", "lr=0.1..0.3"],
        ["data.name=a..b"],
        ["lr=-1..1"],
        ["lrr=0.1..1"],
        ["lr=1..x"],
        ["lr"],
        [],
    ],
)
def test_a_wrong_search_is_refused_in_one_line(bad: list[str]) -> None:
    with pytest.raises(UsageError, match=r"^(--search|setting|unknown setting)") as caught:
        words.read_search(bad)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["eval.split=test"], "a search looks at validation images alone"),
        (["run-dir=x"], "a search has its own folder"),
        (["--metric", "personal_accuracy"], "must be one of personal_validation_accuracy"),
    ],
)
def test_what_a_search_cannot_have_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    assert main(typed(tmp_path / "out", "--search", "lr=0.1,0.2", *more)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_comparison_takes_what_was_chosen_for_each_method(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for method, lr in (("coop", 0.25), ("promptfl", 0.5)):
        (tmp_path / f"{method}.toml").write_text(f'method = "{method}"\nlr = {lr}\n')
    tuned = tuning.read_tuned(tmp_path, ["coop", "promptfl", "zeroshot"])
    values = {**SHORT, "lr": 0.1}
    cells = grid(["coop", "promptfl", "zeroshot"], [0], values, {}, tmp_path, tuned)
    assert [cell.values["lr"] for cell in cells] == [0.25, 0.5, 0.1]
    with pytest.raises(UsageError, match=r"holds no fedper\.toml"):
        tuning.read_tuned(tmp_path, ["fedper"])
    words = ["compare", "--methods", "coop", "--seeds", "0", "--tuned", str(tmp_path)]
    settings = [f"{key}={value}" for key, value in SHORT.items()]
    assert main([*words, "--out", str(tmp_path / "out"), *settings]) == 0
    assert load_settings(tmp_path / "out" / "coop-s0").lr == 0.25
