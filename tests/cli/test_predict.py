"""pfedmoap export and predict: a table, a CSV, one line where something is wrong."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pfedmoap_flwr.cli.main import main
from pfedmoap_flwr.runs.find_model import find_model
from pfedmoap_flwr.runs.folder import RunFolder
from support.tiny import CLASSNAMES

RUN: dict[str, Any] = {"method": "pfedmoap", "num_server_rounds": 2, "local_epochs": 1, "lr": 0.5}


@pytest.fixture
def run(reference: Callable[..., RunFolder]) -> RunFolder:
    return reference(**RUN)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, colour in {"=a.png": (220, 40, 40), "b.png": (40, 40, 220)}.items():
        Image.new("RGB", (16, 16), colour).save(folder / name)
    return folder


def test_export_then_predict(
    run: RunFolder, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, table = tmp_path / "3.safetensors", tmp_path / "out.csv"
    assert main(["export", str(run.path), str(file), "--client", "3"]) == 0
    owners = ", ".join(map(str, run.rounds()[-1].lent[3]))
    assert f"pfedmoap, client 3, after round 2, 4 classes, experts of clients {owners}: " in (
        capsys.readouterr().out
    )
    assert (
        main(["predict", str(file), str(pictures / "b.png"), str(pictures), "--csv", str(table)])
        == 0
    )
    with table.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    paths = [pictures / name for name in ("b.png", "=a.png", "b.png")]
    assert [row["image"] for row in rows] == list(map(str, paths))
    expected = find_model(run.path, 3).predict(paths)
    assert [row["predicted"] for row in rows] == list(expected["predicted"])
    for row, (_, said) in zip(rows, expected.iterrows(), strict=True):
        shares = [float(row[f"p({name})"]) for name in CLASSNAMES]
        assert sum(shares) == pytest.approx(1)
        assert shares == pytest.approx([said[f"p({name})"] for name in CLASSNAMES])
        assert float(row["probability"]) == max(shares) == pytest.approx(said["probability"])
    printed = capsys.readouterr().out
    assert "pfedmoap, client 3, after round 2" in printed
    assert rows[0]["predicted"] in printed
    # The run itself says the same as its file
    assert main(["predict", str(run.path), str(pictures), "--client", "3"]) == 0
    assert rows[0]["predicted"] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["predict", "RUN", "PICTURES"], "--client say whose model, from 0 to 3"),
        (["predict", "RUN", "PICTURES", "--client", "4"], "--client 4: there is none"),
        (["predict", "RUN", "absent.png", "--client", "0"], "absent.png: there is no such image"),
        (["predict", "RUN", "EMPTY", "--client", "0"], "no image in this folder"),
        (["predict", "RUN", "TEXT", "--client", "0"], "text.png: UnidentifiedImageError"),
        (["predict", "RUN", "PICTURES", "--client", "0", "--csv", "a.txt"], "must end with .csv"),
        (["predict", "RUN", "PICTURES", "--client", "0", "--best"], "has no best/"),
        (["predict", "THERE", "PICTURES", "--best"], "--best is for a run's folder"),
        (["predict", "EMPTY", "PICTURES"], "neither a run's folder nor the state folder"),
        (["export", "RUN", "a.pt", "--client", "0"], "must end with .safetensors"),
        (["export", "RUN", "/no/a.safetensors", "--client", "0"], "there is no folder /no"),
        (["export", "RUN", "THERE", "--client", "0"], "is there already"),
    ],
)
def test_wrong_use_is_one_line(
    words: list[str],
    said: str,
    run: RunFolder,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "there.safetensors").write_text("kept")
    places = {"RUN": run.path, "PICTURES": pictures, "EMPTY": tmp_path / "empty"}
    places |= {"TEXT": tmp_path / "text.png", "THERE": tmp_path / "there.safetensors"}
    assert main([str(places.get(word, word)) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pfedmoap: ")
    assert error.count("\n") == 1
    assert said in error
    assert (tmp_path / "there.safetensors").read_text() == "kept"
