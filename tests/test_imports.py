"""What the import contracts of pyproject.toml do not say, and how the source is written.

Methods know nothing of each other; Flower's inner names stay in one file; nothing is pickled; no
private name leaves its module; no file and no function is long.
"""

import ast
from pathlib import Path

import pytest

from pfedmoap_flwr import methods
from pfedmoap_flwr.methods.base import Method
from support import ROOT

PACKAGE = "pfedmoap_flwr"
FILES = [*sorted(ROOT.glob(f"{PACKAGE}/**/*.py")), ROOT / "server_app.py", ROOT / "client_app.py"]
SOURCES = [
    *FILES,
    *(p for d in ("benchmarks", "scripts", "tests") for p in sorted(ROOT.glob(f"{d}/**/*.py"))),
]
OURS = (PACKAGE, "benchmarks", "support")
MAX_FILE, MAX_FUNCTION = 400, 60

every_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
every_source = pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))


def imports(source: str, package: str = "") -> set[str]:
    """The full names of all that is imported, inside functions and for types too.

    `from a import b` counts as a and as a.b; a relative import starts at `package`.
    """
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            start = ".".join([*above, node.module or ""] if node.level else [node.module or ""])
            start = start.strip(".")
            names |= {start} | {f"{start}.{alias.name}" for alias in node.names}
    return names


def of_file(path: Path) -> set[str]:
    return imports(path.read_text(), ".".join(path.relative_to(ROOT).parts[:-1]))


def within(names: set[str], *modules: str) -> set[str]:
    """Those of the names that are one of the modules or below one."""
    return {n for n in names if any(n == m or n.startswith(f"{m}.") for m in modules)}


def pickling(source: str) -> set[str]:
    """What in a source pickles or unpickles."""
    found = within(imports(source), "pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib")
    found |= within(imports(source), "shelve", "marshal", "torch.load", "torch.save")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in {"torch.load", "torch.save"}:
            found.add(ast.unparse(node))
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found.add("allow_pickle")
    return found


def long_functions(source: str) -> set[str]:
    functions = (
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return {f.name for f in functions if (f.end_lineno or 0) - f.lineno + 1 > MAX_FUNCTION}


def private_uses(source: str) -> set[str]:
    """The private names of other modules of this repository that a source imports or reaches."""
    found, ours = set(), set()
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OURS:
            names = {alias.name: alias.asname or alias.name for alias in node.names}
            found |= {name for name in names if is_private(name)}
            ours |= set(names.values())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[0] in ours:
            found |= {node.attr} if is_private(node.attr) else set()
    return found


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


@pytest.mark.parametrize("name", methods.names())
def test_a_method_imports_no_other_method(name: str) -> None:
    others = [f"{PACKAGE}.methods.{other}" for other in methods.names() if other != name]
    source = ROOT / PACKAGE / "methods" / f"{name}.py"
    assert within(of_file(source), *others) == set()
    # Neither by way of the package, which knows them all
    names = of_file(source)
    assert f"{PACKAGE}.methods.load" not in names
    assert f"{PACKAGE}.methods" not in names


@pytest.mark.parametrize("name", methods.names())
def test_a_method_inherits_the_abstraction_and_no_method(name: str) -> None:
    found = methods.load(name)
    above = [kind for kind in found.__mro__[1:] if issubclass(kind, Method)]
    shared = (f"{PACKAGE}.methods.base", f"{PACKAGE}.methods.parts.")
    assert above[-1] is Method
    assert all(kind.__module__.startswith(shared) for kind in above)
    assert found.__module__ == f"{PACKAGE}.methods.{name}"


def test_what_methods_share_knows_no_method() -> None:
    folder = ROOT / PACKAGE / "methods"
    shared = [folder / "base.py", folder / "settings.py", *folder.glob("parts/*.py")]
    assert len(shared) > 4
    others = [f"{PACKAGE}.methods.{name}" for name in methods.names()]
    for path in shared:
        assert within(of_file(path), *others) == set(), path.name


def users_of(*modules: str) -> set[str]:
    return {str(path.relative_to(ROOT)) for path in FILES if within(of_file(path), *modules)}


def test_flower_stays_inside_federation_and_engines() -> None:
    rooms = {Path(user).parts[1] for user in users_of("flwr", "ray")}
    assert rooms == {"federation", "engines"}


def test_flowers_inner_names_are_touched_in_one_file() -> None:
    public = [f"flwr.{name}" for name in ("app", "clientapp", "serverapp")]
    files = [
        path for path in FILES if within(of_file(path), "flwr") - within(of_file(path), *public)
    ]
    assert files == [ROOT / PACKAGE / "engines" / "in_process.py"]
    assert [path for path in FILES if '"_message_id"' in path.read_text()] == files


@every_source
def test_no_private_name_leaves_its_module(path: Path) -> None:
    assert private_uses(path.read_text()) == set()


@every_file
def test_nothing_is_pickled(path: Path) -> None:
    assert pickling(path.read_text()) == set()


@every_file
def test_no_file_and_no_function_is_long(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= MAX_FILE
    assert long_functions(source) == set()


# These tests find what they look for


@pytest.mark.parametrize(
    "source",
    [
        "import a.b.c",
        "from a.b import c",
        "from a import b",
        "from .b import c",
        "from . import b",
        "def f():\n    from a.b.c import d",
        "if TYPE_CHECKING:\n    from a.b import c as d",
    ],
)
def test_every_way_to_import_is_seen(source: str) -> None:
    assert within(imports(source, "a"), "a.b")
    assert not within(imports(source, "a"), "a.bb", "b")


def test_relative_imports_reach_upwards() -> None:
    assert "a.x.y" in imports("from ..x import y", "a.b")
    assert "a.x" in imports("from .. import x", "a.b")


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "from torch import load",
        "np.load(path, allow_pickle=True)",
        "torch.save(x, path)",
    ],
)
def test_pickling_is_seen(source: str) -> None:
    assert pickling(source)


def test_long_functions_are_seen() -> None:
    body = "    x = 1\n"
    assert long_functions("def f():\n" + body * (MAX_FUNCTION - 1)) == set()
    assert long_functions("class A:\n  def f():\n" + body * MAX_FUNCTION) == {"f"}


@pytest.mark.parametrize(
    "source",
    [
        "from pfedmoap_flwr.cache import _put",
        "from pfedmoap_flwr.clip import load\nload._load.cache_clear()",
        "from support import tiny as t\nt.TINY._items()",
    ],
)
def test_private_names_are_seen(source: str) -> None:
    assert private_uses(source)
    assert not private_uses(source.replace("_put", "put").replace("._", "."))
