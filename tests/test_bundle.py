"""What `flwr run` sends: the app alone, and it runs where nothing else of this repository is."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pfedmoap_flwr.runs.folder import RunFolder
from support import ROOT

pytestmark = pytest.mark.processes

RUN = ["num-server-rounds=1", "local-epochs=1", "data.num-clients=5", "data.shots=1"]
PROGRAMS = Path(sys.executable).parent


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The app's bundle, unpacked."""
    folder = tmp_path_factory.mktemp("bundle")
    command = [str(PROGRAMS / "flwr"), "build", "--app", str(ROOT)]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    [file] = folder.glob("*.fab")
    with zipfile.ZipFile(file) as packed:
        packed.extractall(folder / "app")
    return folder / "app"


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that is installed here but this project."""
    folder = tmp_path_factory.mktemp("packages")
    site = Path(pytest.__file__).parents[1]
    for path in site.iterdir():
        if "pfedmoap" not in path.name:
            (folder / path.name).symlink_to(path)
    return folder


def run(bundle: Path, *paths: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the bundle's code. -S: what is installed beside Python, this project too, is not seen."""
    search = os.pathsep.join(map(str, (bundle, *paths)))
    command = [sys.executable, "-S", "-m", "pfedmoap_flwr.cli", "run", *RUN, "run-dir=run"]
    kept = {k: v for k, v in os.environ.items() if k != "PFEDMOAP_ASSETS"}
    return subprocess.run(
        command,
        cwd=folder,
        env={**kept, "PYTHONPATH": search},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_bundle_holds_the_app_and_nothing_else(bundle: Path) -> None:
    top = {path.name for path in bundle.iterdir()}
    app = {"pyproject.toml", "server_app.py", "client_app.py", "pfedmoap_flwr"}
    assert top == app | {"LICENSE", "README.md", ".info"}
    sources = {path.relative_to(ROOT) for path in (ROOT / "pfedmoap_flwr").rglob("*.py")}
    assert {path.relative_to(bundle) for path in bundle.rglob("pfedmoap_flwr/**/*.py")} == sources


def test_the_bundle_runs_with_the_wheel_of_assets(
    bundle: Path, packages: Path, tmp_path: Path
) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(tmp_path)]
    build += ["packaging/assets"]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    [wheel] = tmp_path.glob("pfedmoap_assets-*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(tmp_path / "assets")
    done = run(bundle, packages, tmp_path / "assets", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = RunFolder(tmp_path / "run")
    assert [record.round for record in folder.rounds()] == [0, 1]
    assert folder.summary()["failures"] == 0


def test_a_bundle_without_assets_says_where_to_get_them(
    bundle: Path, packages: Path, tmp_path: Path
) -> None:
    done = run(bundle, packages, folder=tmp_path)
    assert done.returncode == 2
    assert "the wheel pfedmoap-assets" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()
