"""Reports of run folders written by hand: the numbers, who counts, every form, hostile names."""

import csv
import io
import json
from pathlib import Path

import pytest

from pfedmoap_flwr.cli.main import main
from pfedmoap_flwr.report import render
from pfedmoap_flwr.report.build import Wishes, build
from pfedmoap_flwr.report.collect import collect
from pfedmoap_flwr.report.document import Report, Table
from pfedmoap_flwr.report.paper import paper_cells
from support.run_folders import write_run

SCRIPT = "<script>alert(1)</script>"
SMALL = {"data.num-clients": 2}


def table(report: Report, name: str) -> Table:
    return next(table for table in report.tables if table.name.startswith(name))


def cells(table: Table) -> list[list[str]]:
    return [[cell.text for cell in row] for row in table.rows]


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    """Three methods and seeds: coop is best, promptfl near it, fedprox far; two clients each."""
    root = tmp_path / "grid"
    heights = {"coop": (0.50, 0.60, 0.70), "promptfl": (0.52, 0.58, 0.67), "fedprox": (0.3,) * 3}
    for method, of_seeds in heights.items():
        for seed, height in enumerate(of_seeds):
            rows = [[0.1, 0.2], [height - 0.1, height + 0.1]]
            write_run(root / f"{method}-s{seed}", method, seed, rows, flat=SMALL)
    return root


def test_mean_and_spread_are_those_of_the_summaries(grid: Path) -> None:
    report = build(collect([grid]), Wishes())
    [first, *_] = cells(table(report, "accuracy"))
    # Sample standard deviation of 0.5, 0.6, 0.7; worst client and worst decile are 0.1 below
    assert first == ["coop", "3", "60.0 ± 10.0", "30.0 ± 5.0", "20.0 ± 0.0", *["50.0 ± 10.0"] * 2]
    costs = {row[0]: row[1:] for row in cells(table(report, "cost"))}
    assert costs["coop"] == ["3", "8,000 ± 0", "2,000 ± 0", "3 ± 0", "0 ± 0"]


def test_counts_and_numbers_of_rounds_are_no_accuracies(tmp_path: Path) -> None:
    write_run(tmp_path / "one", "coop", 0, [[0.1, 0.2], [0.5, 0.7]], flat=SMALL, validation=0.4)
    report = build(collect([tmp_path]), Wishes())
    [choices] = [t for t in report.tables if "validation" in t.title]
    # Of equal models the personal one is chosen, of equal rounds the first
    assert cells(choices) == [["coop", "1", "60.0", "15.0"]]


def test_peak_memory_is_the_largest_of_a_client_in_megabytes(tmp_path: Path) -> None:
    for seed, memory in enumerate((7e8, 9e8)):
        rows = [[0.1, 0.2], [0.5, 0.7]]
        write_run(tmp_path / f"{seed}", "coop", seed, rows, flat=SMALL, memory=int(memory))
    costs = table(build(collect([tmp_path]), Wishes()), "cost")
    titles = [column.title for column in costs.columns]
    assert cells(costs)[0][titles.index("peak memory, MB")] == "800 ± 141"
    [row] = csv.DictReader(io.StringIO(render.as_csv(costs)))
    assert float(row["peak_memory_mean"]) == 8e8


def test_the_best_is_marked_and_what_cannot_be_told_from_it(grid: Path) -> None:
    report = build(collect([grid]), Wishes())
    marks = {row[0].text: row[2].mark for row in table(report, "accuracy").rows}
    assert marks == {"coop": "best", "promptfl": "same", "fedprox": ""}
    # Where all are equal nobody is best
    assert {row[4].mark for row in table(report, "accuracy").rows} == {""}
    found = {row[0]: row for row in cells(table(report, "differences"))}
    # -2, 2 and 3 points: mean 1, standard error 1.5275, t = 4.3027
    assert found["promptfl"][1:3] == ["1.0 [-5.6, 7.6]", "3"]
    assert found["promptfl"][-1] == "cannot be told from the best"
    assert found["fedprox"][4:] == ["0 / 6 / 0", "lower"]


def test_one_seed_tells_nothing(tmp_path: Path) -> None:
    for method, height in {"coop": 0.6, "promptfl": 0.3}.items():
        write_run(tmp_path / method, method, 0, [[0.1, 0.1], [height, height]], flat=SMALL)
    report = build(collect([tmp_path]), Wishes())
    assert cells(table(report, "differences"))[0][-1] == "one seed says nothing"
    assert all(table.name != "ranks" for table in report.tables)


def test_ranks_are_over_data_sets_and_seeds(grid: Path) -> None:
    for method, height in {"coop": 0.2, "promptfl": 0.4, "fedprox": 0.3}.items():
        flat = {**SMALL, "data.name": "dtd"}
        write_run(grid / f"dtd-{method}", method, 0, [[0.1, 0.1], [height, height]], flat=flat)
    report = build(collect([grid]), Wishes())
    ranks = table(report, "ranks")
    # Places of coop 2 1 1 3, promptfl 1 2 2 1, fedprox 3 3 3 2
    assert cells(ranks) == [["promptfl", "1.50"], ["coop", "1.75"], ["fedprox", "2.75"]]
    assert "over 4 blocks" in ranks.notes[0]
    assert [row[:2] for row in cells(table(report, "accuracy"))][:2] == [
        ["dtd", "promptfl"],
        ["dtd", "fedprox"],
    ]


def test_the_mean_of_five_rounds_is_another_number_and_says_so(tmp_path: Path) -> None:
    rows = [[0.1, 0.1], *([x, x + 0.2] for x in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5))]
    write_run(tmp_path / "run", "coop", 0, rows, flat=SMALL)
    last, five = (build(collect([tmp_path]), Wishes(rule=r)) for r in ("last", "mean5"))
    assert cells(table(last, "accuracy"))[0][2] == "60.0"
    assert cells(table(five, "accuracy"))[0][2:3] == ["40.0"]
    assert cells(table(five, "accuracy"))[0][-1] == "30.0"
    assert table(last, "accuracy").title == "Accuracy, after the last round"
    assert table(five, "accuracy").title == "Accuracy, mean of the last five rounds"


def test_the_worst_decile_is_a_mean_of_the_lowest_tenth(tmp_path: Path) -> None:
    heights = [0.9] * 18 + [0.1, 0.3, 0.5]
    write_run(tmp_path / "run", "coop", 0, [heights, heights], flat={"data.num-clients": 21})
    # Three of 21
    assert cells(table(build(collect([tmp_path]), Wishes()), "accuracy"))[0][-2:] == [
        "10.0",
        "30.0",
    ]


# Which runs count


def test_what_is_not_done_is_named_and_in_no_mean(grid: Path) -> None:
    write_run(grid / "half", "pfedmoap", 0, [[0.9, 0.9]] * 2, end="half", flat=SMALL)
    write_run(grid / "bad", "fedamp", 3, [[0.9, 0.9]] * 2, end="ValueError: no luck", flat=SMALL)
    (grid / "torn").mkdir()
    (grid / "torn" / "settings.json").write_text("{")
    report = build(collect([grid]), Wishes())
    assert {row[0] for row in cells(table(report, "accuracy"))} == {"coop", "promptfl", "fedprox"}
    waiting = cells(table(report, "left-out"))
    assert waiting[0][:3] == ["fedamp", "3", "failed after round 1 of 1: ValueError: no luck"]
    assert waiting[1][:3] == ["pfedmoap", "0", "half done: round 1 of 2"]
    assert "settings.json, line 1: is not JSON" in waiting[2][2]


def test_what_a_resumed_run_went_on_with_stands_beside_what_it_began_with(tmp_path: Path) -> None:
    written = write_run(tmp_path / "one", "coop", 0, [[0.1, 0.2], [0.5, 0.7]], flat=SMALL)
    assert (
        "Made with commit abc123, device cpu, torch 2.9."
        in build(collect([tmp_path]), Wishes()).notes
    )
    file = written / "environment.json"
    resumed = [{"after_round": 0, "commit": "def456"}, {"after_round": 1, "torch": "2.10"}]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"resumed": resumed}))
    said = "Made with commit abc123 and def456, device cpu, torch 2.9 and 2.10."
    assert said in build(collect([tmp_path]), Wishes()).notes


def test_swept_settings_are_in_the_name_and_other_partitions_in_the_data_set(
    tmp_path: Path,
) -> None:
    for number, flat in enumerate([{"lr": 0.1}, {"lr": 0.2}, {"lr": 0.1, "data.alpha": 0.5}]):
        write_run(tmp_path / str(number), "coop", 0, [[0.1], [0.5]], flat=flat)
    write_run(tmp_path / "other", "zeroshot", 0, [[0.1], [0.5]])
    found = collect([tmp_path])
    assert set(found.labels.values()) == {"coop lr=0.1", "coop lr=0.2", "zeroshot"}
    assert set(found.datasets.values()) == {
        "emoji-domains data.alpha=0.3",
        "emoji-domains data.alpha=0.5",
    }


def test_a_folder_given_twice_and_a_copied_run_count_once(grid: Path) -> None:
    write_run(grid / "copy", "coop", 0, [[0.9, 0.9]] * 2, flat=SMALL)
    found = collect([grid, grid / "coop-s0"])
    assert len(found.done) == 9
    assert "has the settings and the seed of coop-s0" in found.left_out[grid / "copy"] or (
        found.left_out == {grid / "coop-s0": "has the settings and the seed of copy"}
    )


def test_folders_without_a_run_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "no settings.json there or below" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "gone")]) == 2
    assert "there is no such folder" in capsys.readouterr().err


def test_other_rows_and_metrics(grid: Path) -> None:
    wishes = Wishes(by=["method", "seed"], metrics=["global", "bytes-up"])
    found = cells(table(build(collect([grid]), wishes), "results"))
    assert ["coop", "1", "1", "30.0", "2,000"] in found
    wishes = Wishes(by=["lr", "client"], metrics=["personal"])
    found = cells(table(build(collect([grid]), wishes), "results"))
    assert [row[:3] for row in found] == [["0.002", "1", "9"], ["0.002", "0", "9"]]


@pytest.mark.parametrize(
    ("words", "said"), [(["--by", "size"], "--by size: is no"), (["--metric", "f1"], "no run has")]
)
def test_an_unknown_grouping_or_metric_is_one_line(
    grid: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(grid), *words]) == 2
    assert said in capsys.readouterr().err


# The paper


def test_the_papers_number_stands_beside_the_same_data_set_with_what_differs(
    tmp_path: Path,
) -> None:
    flat = {"data.name": "dtd", "data.partition": "pathological", "data.num-clients": 10}
    write_run(tmp_path / "p", "pfedmoap", 0, [[0.1], [0.9]], flat=flat)
    write_run(tmp_path / "e", "pfedmoap", 0, [[0.1], [0.9]], flat={"data.name": "emoji-domains"})
    report = build(collect([tmp_path]), Wishes(against_paper=True))
    [row] = cells(table(report, "paper"))
    assert row[2:7] == ["Table 1, pFedMoAP", "89.13 ± 0.54", "90.0", "1", "0.9"]
    assert "clip.model=mini (paper RN50-quickgelu)" in row[7]
    assert "data.partition" not in row[7]


def test_rows_of_ablations_ask_for_their_settings(tmp_path: Path) -> None:
    def named(**flat: object) -> set[str]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        write_run(folder, "pfedmoap", 0, [[0.1], [0.9]], flat={"data.name": "dtd", **flat})
        return {f"{c.table}, {c.row}" for c in paper_cells(collect([folder]).runs[0])}

    assert named() == {"Table 1, pFedMoAP"}
    assert named(**{"pfedmoap.lambda": 0.0}) == {"Table 1, pFedMoAP, lambda = 0"}
    assert named(**{"pfedmoap.d-gating": 256}) == {"Table 9, d_gating = 256"}
    assert named(**{"pfedmoap.gate-shared": True}) == {"Table 7, gate averaged"}


# Forms


def test_markdown_and_latex_escape_names(tmp_path: Path) -> None:
    write_run(tmp_path / "r", "coop", 0, [[0.1], [0.5]], end="a|b_c*$x% <b>", flat=SMALL)
    write_run(tmp_path / "s", "coop", 1, [[0.1], [0.5]], flat=SMALL)
    report = build(collect([tmp_path]), Wishes())
    assert r"a\|b\_c\*$x% &lt;b&gt;" in render.rendered(report, "md")
    tex = render.rendered(report, "latex")
    assert r"a\textbar{}b\_c*\$x\% \textless{}b\textgreater{}" in tex
    assert r"\toprule" in tex
    assert tex.count(r"\begin{tabular}") == tex.count(r"\end{tabular}") == 3


def test_csv_has_whole_numbers_and_no_formula(tmp_path: Path) -> None:
    write_run(tmp_path / "r", "coop", 0, [[0.1], [1 / 3]], domain="=1+1", classnames=("@x", "-y"))
    clients = table(build(collect([tmp_path]), Wishes()), "clients")
    [row] = csv.DictReader(io.StringIO(render.as_csv(clients)))
    assert (row["domain"], row["classes"]) == ("'=1+1", "'@x, -y")
    assert float(row["personal"]) == 1 / 3
    below = Table("t", "t", clients.columns, [[*clients.rows[0][:-1], clients.rows[0][-1]]])
    assert "'0" not in render.as_csv(below), "a number stays a number"


def test_every_form_is_written_and_one_goes_to_a_pipe(
    grid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(grid), "--out", str(tmp_path / "out")]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"report.md", "report.tex", "report.html", "accuracy.csv", "ranks.csv"} <= names
    capsys.readouterr()
    assert main(["report", str(grid), "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert float(rows[0]["personal_sd"]) == pytest.approx(0.1)
    assert json.loads((grid / "coop-s0" / "summary.json").read_text())["personal_accuracy"] == (
        pytest.approx(0.5)
    )
