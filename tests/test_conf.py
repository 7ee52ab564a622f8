"""Every file of conf/ is a set of settings that exist."""

from pathlib import Path

import pytest

from pfedmoap_flwr import config, methods
from pfedmoap_flwr.data.catalogue import find_source
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.parts.privacy import epsilon_after
from pfedmoap_flwr.settings import fields
from support import ROOT

# Section 4.1: rounds, participation, backbone by table
PAPER = {
    "table1": (10, 1.0, "RN50"),
    "table2": (120, 0.1, "RN50"),
    "table3": (25, 0.25, "ViT-B-16"),
    "table4": (25, 0.5, "ViT-B-16"),
    "table6": (10, 1.0, "RN50"),
    "table7": (10, 1.0, "RN50"),
    "table8": (25, 0.25, "ViT-B-16"),
    "table9": (10, 1.0, "RN50"),
    "figure3": (10, 1.0, "RN50"),
    "figure4": (10, 1.0, "RN50"),
    "figure5": (120, 0.1, "RN50"),
    "figure6": (10, 1.0, "RN50"),
}
FIVE = ["flowers102", "oxford-pets", "food101", "caltech101", "dtd"]
DATA = {
    "table1": FIVE,
    "table2": ["cifar10", "cifar100"],
    "table3": ["domainnet"],
    "table4": ["office-caltech10"],
    "table6": FIVE,
    "table7": FIVE,
    "table8": ["domainnet"],
    "table9": FIVE,
    "figure3": FIVE,
    "figure4": FIVE,
    "figure5": ["cifar10"],
    "figure6": FIVE,
}
CONF = sorted((ROOT / "conf").glob("*.toml"))


@pytest.mark.parametrize("path", CONF, ids=lambda path: path.stem)
def test_a_conf_file_is_valid(path: Path) -> None:
    config.parse(config.parse_file(path))


def test_every_table_and_figure_has_one_file() -> None:
    assert {path.stem for path in CONF if path.stem.startswith(("table", "figure"))} == PAPER.keys()


@pytest.mark.parametrize(
    ("table", "name"), [(table, name) for table, names in DATA.items() for name in names]
)
def test_a_table_of_the_paper_has_its_data_and_its_clients(table: str, name: str) -> None:
    flat = config.parse_file(ROOT / "conf" / f"{table}.toml")
    assert flat["data.name"] in DATA[table]
    settings = config.parse({**flat, "data.name": name})
    source = find_source(name)
    assert (settings.data.partition, settings.data.num_clients) == (
        source.partition,
        source.clients,
    )
    rounds, fraction, model = PAPER[table]
    assert settings.num_server_rounds == rounds
    assert settings.fraction_train == fraction
    assert (settings.clip.model, settings.clip.pretrained) == (f"{model}-quickgelu", "openai")
    assert settings.local_epochs == 5
    assert settings.lr == 0.002


@pytest.mark.parametrize(("epsilon", "noise"), [(50, None), (25, 0.552)])
def test_table_6_spends_its_epsilon_in_its_rounds(epsilon: int, noise: float | None) -> None:
    settings = config.parse(config.parse_file(ROOT / "conf" / "table6.toml"))
    said, rounds = settings.privacy, settings.num_server_rounds
    noise = noise or said.noise
    assert (said.delta, said.budget) == (0.05, 50)
    assert 0.99 * epsilon < epsilon_after(rounds, noise, said.delta) <= epsilon


def test_every_method_has_one_and_a_page() -> None:
    docs = ROOT / "docs" / "methods"
    assert set(methods.names()) <= {path.stem for path in CONF}
    assert set(methods.names()) == {path.stem for path in docs.glob("*.md")} - {"README"}


@pytest.mark.parametrize("name", methods.names())
def test_a_methods_page_names_its_settings(name: str) -> None:
    page = (ROOT / "docs" / "methods" / f"{name}.md").read_text()
    assert [k for k in fields(methods.load(name).section, f"{name}.") if f"`{k}`" not in page] == []


def test_a_conf_file_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = config.parse_file(ROOT / "conf" / "table1.toml")
    monkeypatch.chdir(tmp_path)
    assert config.parse_file(Path("table1")) == config.parse_file(Path("table1.toml")) == expected
    (tmp_path / "table1").write_text("seed = 5")
    assert config.parse_file(Path("table1")) == {"seed": 5}
    with pytest.raises(UsageError, match=r"--conf tabel1: no such file.* table1 is the nearest"):
        config.parse_file(Path("tabel1"))
