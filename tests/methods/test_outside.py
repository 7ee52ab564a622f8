"""Methods from outside: a file that a command names, a wheel's entry point, and never a message."""

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flwr.app import Context, Message, RecordDict

from pfedmoap_flwr import api, config, methods
from pfedmoap_flwr.cli import main as cli
from pfedmoap_flwr.engines.in_process import identify, make_context
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.federation import client
from pfedmoap_flwr.methods import outside
from pfedmoap_flwr.runs.folder import RunFolder
from pfedmoap_flwr.settings import Value
from support import ROOT
from support.federation import Federate, assert_same, rounds, run_tiny, tensor_files
from support.laws import SHORT, THREE_ROUNDS
from support.tiny import TINY

Outside = Callable[..., str]


def worked_example() -> str:
    """The method file that docs/development.md shows."""
    page = (ROOT / "docs" / "development.md").read_text()
    found = re.search(r'```python\n("""near\.py.*?)```', page, flags=re.DOTALL)
    assert found
    return found[1]


def forget() -> None:
    methods.names.cache_clear()
    methods.load.cache_clear()
    outside.from_file.cache_clear()
    outside.installed.cache_clear()


@pytest.fixture(autouse=True)
def _known_here_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(outside.FILES, "")
    yield
    monkeypatch.undo()
    forget()


@pytest.fixture
def near(tmp_path: Path) -> Path:
    path = tmp_path / "mine" / "near.py"
    path.parent.mkdir()
    path.write_text(worked_example())
    return path


def test_fedprox_as_a_file_is_fedprox_to_the_bit(near: Path, federate: Federate) -> None:
    assert methods.named(str(near)) == "near"
    theirs = federate("theirs/run", method="fedprox", flat={"fedprox.mu": 0.7}, **THREE_ROUNDS)
    ours = federate("ours/run", method="near", flat={"near.mu": 0.7}, **THREE_ROUNDS)
    assert_same(ours, theirs)
    weaker = federate("weaker/run", method="near", flat={"near.mu": 0.1}, **THREE_ROUNDS)
    assert tensor_files(weaker) != tensor_files(ours)


def test_a_run_of_a_file_is_resumed_as_any_other(
    near: Path, federate: Federate, tmp_path: Path
) -> None:
    methods.named(str(near))
    whole = federate("whole/run", method="near", **THREE_ROUNDS)
    run = federate("parts/run", method="near", **{**THREE_ROUNDS, "num_server_rounds": 1})
    go_on: dict[str, Value] = {"resume": str(run.path), "num-server-rounds": 3}
    near.write_text(near.read_text() + "\n# another file\n")
    with pytest.raises(UsageError, match=r"near\.py: is not as it was when the run in .* began"):
        api.plan(go_on)
    near.write_text(worked_example())
    api.execute(api.plan(go_on))
    assert_same(run, whole)


def test_a_run_that_needs_a_file_says_so_where_it_is_not_named(
    near: Path, federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods.named(str(near))
    run = federate(method="near", **SHORT)
    monkeypatch.setenv(outside.FILES, "")
    forget()
    with pytest.raises(UsageError, match="near"):
        api.plan({"resume": str(run.path)})
    assert api.plan({**api.to_flat({"method": near}), "resume": str(run.path)}).run_dir == run.path


BAD = {
    "gone": (None, "there is no such Python file"),
    "empty": ("x = 1\n", "must define one subclass of Method, and defines none"),
    "two": (
        "from pfedmoap_flwr.methods.base import Method\n"
        "class A(Method): ...\nclass B(Method): ...\n",
        "must define one subclass of Method, and defines A, B",
    ),
    "raises": ("import math\n\nmath.sqrt(-1)\n", "line 3: ValueError: "),
    "lacks": ("import no_such_module\n", "line 1: ModuleNotFoundError: No module named"),
    "syntax": ("def f(:\n", "line 1: SyntaxError: "),
    "fedprox": ("x = 1\n", "'fedprox' cannot be a method's name here"),
    "data": ("x = 1\n", "'data' cannot be a method's name here"),
    "My-Method": ("x = 1\n", "'My-Method' cannot be a method's name here"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("command", ["run", "compare", "check-method"])
def test_a_bad_file_is_one_line(
    name: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, said = BAD[name]
    path = tmp_path / f"{name}.py"
    if text is not None:
        path.write_text(text)
    option = {"run": ["--method"], "compare": ["--methods"], "check-method": []}[command]
    assert cli.main([command, *option, str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"method file {path}" in error
    assert said in error
    assert name in methods.built_in() or name not in methods.names()


def test_two_files_of_one_name_are_refused(near: Path, tmp_path: Path) -> None:
    methods.named(str(near))
    methods.named(str(near))
    other = tmp_path / "near.py"
    other.write_text(worked_example())
    with pytest.raises(UsageError, match="is called near too; rename one"):
        methods.named(str(other))


def test_a_command_knows_a_files_settings(
    near: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"{key}={value}" for key, value in {**TINY, "num-server-rounds": 1}.items()]
    words += ["local-epochs=1", "near.mu=0.5"]
    out = tmp_path / "comparison"
    command = ["compare", *words, "--methods", f"fedprox,{near}", "--seeds", "0"]
    assert cli.main([*command, "--out", str(out)]) == 0
    theirs, ours = (RunFolder(out / f"{name}-s0") for name in ("fedprox", "near"))
    assert rounds(ours) == rounds(theirs)
    assert cli.main(["run", "--method", str(near), "near.nu=1"]) == 2
    assert "unknown setting 'near.nu'; did you mean 'near.mu'?" in capsys.readouterr().err


# What a message names


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that leaves a mark where it is run, in the folder in which a node was started."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "trap.py"
    path.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n{worked_example()}")
    return path


@pytest.mark.parametrize("said", ["{path}", "trap.py", "./trap.py", "trap", "trap.Near", "/trap"])
def test_a_node_runs_no_file_that_a_message_names(said: str, trap: Path) -> None:
    identify()
    named = said.format(path=trap)
    state = str(trap.parent / "state")
    config_ = {**TINY, "method": named, "state-dir": state, "trap.mu": 0.1}
    context: Context = make_context(1, {"partition-id": 0}, config_)
    for kind in ("query", "train", "evaluate"):
        message = Message(RecordDict(), 1, kind)
        message.metadata.__dict__["_message_id"] = "1"
        (reply,) = client.answer([(message, context)])
        assert reply.has_error()
        assert "method" in reply.error.reason or "trap" in reply.error.reason
    with pytest.raises(UsageError):
        config.parse({"method": named})
    assert not (trap.parent / "ran").exists()


def test_a_deployment_is_not_rehearsed_with_a_file(
    near: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["deploy", "local", "--method", str(near)]) == 2
    assert "nodes run no file; install the method on each as a wheel" in capsys.readouterr().err


# Wheels


def install(folder: Path, points: dict[str, str]) -> None:
    """A distribution as pip leaves it, less its files."""
    info = folder / "theirs-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.2\n")
    lines = "\n".join(f"{name} = {value}" for name, value in points.items())
    (info / "entry_points.txt").write_text(f"[{outside.GROUP}]\n{lines}\n")


def test_a_wheels_methods_are_known_by_name_to_nodes_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, federate: Federate
) -> None:
    (tmp_path / "theirs.py").write_text(worked_example())
    points = {"theirs": "theirs:Near", "module": "theirs", "fedprox": "theirs:Near"}
    points |= {"broken": "no_such_module:Near", "odd": "theirs:NearSettings"}
    install(tmp_path, points)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    forget()
    assert set(methods.names()) - set(methods.built_in()) == {"theirs", "module", "broken", "odd"}
    assert methods.load("fedprox").__module__ == "pfedmoap_flwr.methods.fedprox"
    assert methods.load("module") is methods.load("theirs")
    ours = federate("ours/run", method="theirs", flat={"theirs.mu": 0.7}, **SHORT)
    theirs = federate("theirs/run", method="fedprox", flat={"fedprox.mu": 0.7}, **SHORT)
    assert_same(ours, theirs)
    assert '"method_package": "theirs 1.2"' in (ours.path / "environment.json").read_text()
    with pytest.raises(UsageError, match=r"method broken of theirs: ModuleNotFoundError: No mod"):
        config.parse({"method": "broken"})
    with pytest.raises(UsageError, match=r"method odd of theirs: .* is no subclass of Method"):
        config.parse({"method": "odd"})


def test_a_run_says_that_it_went_on_with_another_version_of_a_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, federate: Federate
) -> None:
    (tmp_path / "theirs.py").write_text(worked_example())
    install(tmp_path, {"theirs": "theirs:Near"})
    monkeypatch.syspath_prepend(tmp_path)
    forget()
    run = federate("ours/run", method="theirs", num_server_rounds=1, **SHORT)
    metadata = tmp_path / "theirs-1.2.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("1.2", "1.3"))
    importlib.invalidate_caches()
    api.execute(api.plan({"resume": str(run.path), "num-server-rounds": 2}))
    made = json.loads((run.path / "environment.json").read_text())
    assert made["method_package"] == "theirs 1.2"
    assert made["resumed"][0]["method_package"] == "theirs 1.3"


# Other processes


@pytest.mark.processes
@pytest.mark.slow
def test_6_a_file_runs_in_flowers_processes(near: Path, tmp_path: Path) -> None:
    methods.named(str(near))
    values = {**TINY, "method": "near", "near.mu": 0.7, "num-server-rounds": 1}
    values.pop("clients-at-once")
    here = run_tiny(tmp_path / "here", **values)
    there = api.execute(api.plan({**values, "run-dir": str(tmp_path / "there")}), "ray")
    measured = RunFolder(there.folder).rounds()
    assert [r.clients for r in measured] == [r.clients for r in here.rounds()]


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("honest", [True, False])
def test_the_laws_are_checked_on_a_file(honest: bool, near: Path) -> None:
    if not honest:
        text = near.read_text().replace("self.own.mu", "torch.rand(()) * self.own.mu")
        near.write_text(text.replace("from torch import", "import torch\nfrom torch import", 1))
    command = [sys.executable, "-m", "pfedmoap_flwr.cli", "check-method", str(near)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == (0 if honest else 1), done.stdout + done.stderr
    words = ["law  1  holds", "law 14  " if honest else "law  2  BROKEN", "not checked here"]
    assert all(word in done.stdout for word in words), done.stdout
