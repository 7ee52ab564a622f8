"""pfedmoap data: the numbers are those of the files, and nothing is computed twice."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pfedmoap_flwr.cli import main as cli
from pfedmoap_flwr.cli.data import place
from pfedmoap_flwr.clip import features
from pfedmoap_flwr.clip.load import FrozenClip
from pfedmoap_flwr.clip.tower import encode_image
from pfedmoap_flwr.data import SPLITS
from pfedmoap_flwr.data.catalogue import BUNDLED, CATALOGUE, FOLDER
from support import ROOT
from support.copies import tables, write_parquet
from support.tiny import CLASSNAMES, DOMAINS, NUM_CLIENTS, PER_CLASS, TINY

WORDS = [f"{key}={value}" for key, value in TINY.items()]
Printed = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def cells(printed: str) -> dict[str, list[str]]:
    """The rows of a table by their first cell."""
    rows = [[c.strip() for c in line.strip("│").split("│")] for line in printed.splitlines()]
    return {row[0]: row[1:] for row in rows if len(row) > 3}


# list


def test_list_says_what_the_docs_say(capsys: Printed) -> None:
    assert cli.main(["data", "list"]) == 0
    printed = capsys.readouterr().out.splitlines()
    lines = {line.split()[0]: line for line in printed if line.split()}
    docs = (ROOT / "docs" / "data.md").read_text()
    for source in CATALOGUE.values():
        line = lines[source.name]
        assert source.licence in line
        if source.name in (FOLDER, BUNDLED):
            continue
        (row,) = (r for r in docs.splitlines() if r.startswith(f"| `{source.name}` |"))
        _, classes, sizes, domains, *_ = (cell.strip() for cell in row.strip("|").split("|"))
        numbers = [int(n.replace(",", "")) for n in re.findall(r"\d[\d,]*", sizes.split(" cut")[0])]
        said = line.split()[1:4]
        assert said[0] == classes.split()[0]
        assert said[1] == (domains or "1")
        assert said[2] == ("-" if source.name == "domainnet" else f"{sum(numbers):,}")
        assert not source.hub or f"{source.name}: hub {source.hub}" in printed
        assert " not here " in line


def test_list_counts_the_bundled_set(capsys: Printed) -> None:
    assert cli.main(["data", "list"]) == 0
    (line,) = (row for row in capsys.readouterr().out.splitlines() if f" {BUNDLED} " in row)
    total = len(CLASSNAMES) * len(DOMAINS) * sum(PER_CLASS.values())
    assert line.split()[1:4] == [str(len(CLASSNAMES)), str(len(DOMAINS)), str(total)]
    assert line.split()[4] == "bundled"


def test_a_set_is_here_once_the_hubs_cache_holds_it_whole(tmp_path: Path) -> None:
    folder = tmp_path / "hf" / "flwrlabs___pacs" / "default" / "0.0.0"
    for version, said in (("a1.incomplete", "not here"), ("a1", "hub cache")):
        (folder / version).mkdir(parents=True)
        (folder / version / "dataset_info.json").write_text("{}")
        assert place(CATALOGUE["pacs"]) == said
    assert place(CATALOGUE["office-caltech10"]) == "not here"


# show


def manifest(capsys: Printed, *words: str) -> dict[str, Any]:
    assert cli.main(["data", "show", "--json", *WORDS, *words]) == 0
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    return said


def test_show_counts_what_the_files_hold(capsys: Printed, tiny_assets: Path) -> None:
    said = manifest(capsys, "seed=3")
    assert cli.main(["data", "show", *WORDS, "seed=3"]) == 0
    printed = capsys.readouterr().out
    rows = cells(printed)
    files = {s: pq.read_table(tiny_assets / BUNDLED / f"{s}.parquet") for s in SPLITS}
    assert len(said["clients"]) == NUM_CLIENTS
    for client in said["clients"]:
        domain, *counts, train, validation, test = rows[str(client["client"])]
        labels = files["train"]["label"].to_numpy()[client["rows"]["train"]]
        of_class = Counter(labels.tolist())
        assert counts == [str(of_class[c]) if of_class[c] else "." for c in range(len(CLASSNAMES))]
        assert [train, validation, test] == [str(len(client["rows"][s])) for s in SPLITS]
        domains = files["train"]["domain"].to_numpy()[client["rows"]["train"]]
        assert {DOMAINS[d] for d in domains} == {domain}
    for column, count in enumerate(PER_CLASS.values(), -len(SPLITS)):
        held = sum(int(rows[str(client)][column]) for client in range(NUM_CLIENTS))
        assert held == count * len(CLASSNAMES) * len(DOMAINS)
    assert said["sha256"] in printed
    assert "no image is in two splits" in printed
    assert "source: bundled" in printed


def test_where_classes_do_not_fit_the_largest_are_named(
    capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = manifest(capsys)
    monkeypatch.setenv("COLUMNS", "79")
    monkeypatch.setattr("pfedmoap_flwr.report.data_tables.LARGEST", 1)
    monkeypatch.setattr("pfedmoap_flwr.report.data_tables.narrowest", lambda *_: 80)
    assert cli.main(["data", "show", *WORDS]) == 0
    rows = cells(capsys.readouterr().out)
    for client in said["clients"]:
        counts = np.array(client["classes"]["train"])
        _, classes, largest, *_ = rows[str(client["client"])]
        assert int(classes) == np.count_nonzero(counts)
        assert largest == f"{CLASSNAMES[counts.argmax()]} {counts.max() / counts.sum():.0%}"


def test_duplicates_are_counted(capsys: Printed, tmp_path: Path) -> None:
    made = tables(CATALOGUE["pacs"], per_class=3)
    copy = write_parquet(tmp_path / "copy", made)
    words = ["data.name=pacs", f"data.path={copy}", "data.num-clients=4", "data.min-examples=1"]
    assert cli.main(["data", "show", *words, "data.partition=iid"]) == 0
    printed = capsys.readouterr().out
    # Pixels say class and domain alone: each image is there several times
    assert re.search(r"images of test that are in train too: \d+", printed)
    assert "source: local copy" in printed


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--figure", "some.png"], "some.png"),
        (["--figure", "some.png", "seed=1"], "some.png"),
        (["--figure=some.svg"], "some.svg"),
    ],
)
def test_the_figure_is_a_picture(words: list[str], name: str, tmp_path: Path) -> None:
    assert cli.main(["data", "show", *WORDS, *words]) == 0
    (path,) = tmp_path.iterdir()
    assert path.name == name
    if name.endswith(".svg"):
        assert "<svg" in path.read_text()
        return
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert all(300 < side < 3000 for side in picture.size)
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 5


def test_without_figure_no_file_is_left(tmp_path: Path) -> None:
    assert cli.main(["data", "show", *WORDS]) == 0
    assert not list(tmp_path.iterdir())


# prepare


def test_prepare_computes_once(
    capsys: Printed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PFEDMOAP_CACHE", str(tmp_path / "cache"))
    assert cli.main(["data", "prepare", *WORDS]) == 0
    first = capsys.readouterr().out
    files = list((tmp_path / "cache").glob("*.npy"))
    assert len(files) == len(SPLITS)
    assert first.count("computed") == len(SPLITS)
    assert str(tmp_path / "cache") in first

    def none(self: FrozenClip) -> Any:
        raise AssertionError("the image tower is loaded again")

    monkeypatch.setattr(FrozenClip, "image_tower", none)
    assert cli.main(["data", "prepare", *WORDS]) == 0
    second = capsys.readouterr().out
    assert "all is there" in second
    assert second.count("was there") == len(SPLITS)
    # What a run reads is just that
    assert cli.main(["run", *WORDS, "num-server-rounds=1"]) == 0


def test_prepare_that_was_stopped_goes_on(
    capsys: Printed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PFEDMOAP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(features, "BATCH", 8)
    batches = []

    def stopping(*said: Any) -> Any:
        batches.append(1)
        if len(batches) == 4:
            raise KeyboardInterrupt
        return encode_image(*said)

    monkeypatch.setattr(features, "encode_image", stopping)
    assert cli.main(["data", "prepare", *WORDS]) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "pfedmoap: stopped; the same command goes on from there"
    assert cli.main(["data", "prepare", *WORDS]) == 0
    # Of 96, 32 and 64 images: three batches of the first were there
    assert len(batches) == 4 + 9 + 4 + 8


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["show", "data.name=imagenet"], "unknown data set"),
        (["show", "data.num-clients=3"], "multiple of the 2 domains"),
        (["show", "--figure", "x.pdf"], ".png or .svg"),
        (["show", "--figure", "seed=1"], ".png or .svg"),
        (["show", "--figure", "nowhere/x.png"], "there is no folder"),
        (["show", "--conf", "none.toml"], "none.toml: cannot be read"),
        (["prepare", "clip.pretrained=/no/such/weights.pt"], "no such file"),
        (["prepare", "--method", "nothing"], "must be one of"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(words: list[str], said: str, capsys: Printed) -> None:
    command, *rest = words
    assert cli.main(["data", command, *WORDS, *rest]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pfedmoap: ")
    assert error.count("\n") == 1
    assert said in error
