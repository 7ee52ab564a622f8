"""docs/tutorial.ipynb runs from its first cell to its last, and shows what it speaks of."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from support import ROOT

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("embedded")]
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"


def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    place = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()
    told = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    said = [str(outputs) for outputs in told]
    assert "personal_accuracy" in said[0]
    assert "predicted" in said[4]
    assert "own" in said[5]
    assert "pfedmoap, client 0, after round 2" in said[7]
    assert "zeroshot" in said[8]
    runs = [*tmp_path.glob("runs/*-compare/*/settings.json")]
    assert len(runs) == 3
