"""Every named data set through the code that loads the real one; no network is used."""

import gzip
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest

from pfedmoap_flwr.data import SPLITS
from pfedmoap_flwr.data.catalogue import BUNDLED, CATALOGUE, FOLDER, Source, find_source
from pfedmoap_flwr.data.holdout import holdout
from pfedmoap_flwr.data.images import ImageData, load_images
from pfedmoap_flwr.data.labels import join
from pfedmoap_flwr.data.settings import ImageSettings
from pfedmoap_flwr.errors import UsageError
from support import ROOT
from support.copies import (
    DOMAINS,
    ON_HUB,
    PER_CLASS,
    hub_names,
    in_the_cache,
    png,
    read,
    tables,
    write_parquet,
    write_tree,
)

PAPER = {
    "flowers102": 102,
    "oxford-pets": 37,
    "food101": 101,
    "caltech101": 100,
    "dtd": 47,
    "cifar10": 10,
    "cifar100": 100,
    "domainnet": 10,
    "office-caltech10": 10,
}
BESIDES = {"fashion-mnist": 10, "office-home": 65, "pacs": 7}
every_hub_set = pytest.mark.parametrize("source", ON_HUB, ids=lambda source: source.name)


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, and Arrow files in the test's own folder."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def shown(images: ImageData, source: Source) -> Iterator[tuple[str, str, str, str]]:
    """Class and domain by the labels, and by the pixels, of every image."""
    names, domains = hub_names(source), DOMAINS.get(source.name, [""])
    for split in SPLITS:
        labels, of_domain = images.column(split, "label"), images.column(split, "domain")
        for row, label, domain in zip(images.splits[split], labels, of_domain, strict=True):
            number, place = read(row["image"])
            readable = source.readable(names[number]).casefold()
            yield (
                images.classnames[label].casefold(),
                readable,
                images.domains[domain],
                domains[place],
            )


def test_all_are_there() -> None:
    counts = {name: len(source.classnames) for name, source in CATALOGUE.items()}
    assert counts == {**PAPER, **BESIDES, FOLDER: 0, BUNDLED: 0}
    for source in CATALOGUE.values():
        assert isinstance(source.classnames, tuple)
        assert len({name.casefold() for name in source.classnames}) == len(source.classnames)
        assert not any("_" in name for name in source.classnames)
        assert "{}" in source.template


def test_the_docs_say_what_the_catalogue_says() -> None:
    text = (ROOT / "docs" / "data.md").read_text()
    for source in CATALOGUE.values():
        if source.name in (FOLDER, BUNDLED):
            continue
        (row,) = (line for line in text.splitlines() if line.startswith(f"| `{source.name}` |"))
        assert f"| {len(source.classnames)} " in row
        for said in (source.hub, source.template, source.licence):
            assert said in row
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        kind, _, clients = cells[-1].rpartition(", ")
        assert int(clients.split()[0] if clients else 0) == source.clients
        paper = {"": "", "pathological": "pathological", "Dirichlet(0.5)": "dirichlet"}
        paper["Dirichlet(0.3) in each domain"] = "dirichlet-domain"
        assert paper[kind] == source.partition


@pytest.mark.slow
@every_hub_set
def test_labels_are_joined_by_name(source: Source, tmp_path: Path) -> None:
    copy = write_parquet(tmp_path / "copy", tables(source))
    images = load_images(ImageSettings(name=source.name, path=str(copy)))
    assert images.classnames == source.classnames
    assert images.domains == tuple(sorted(DOMAINS.get(source.name, [""])))
    for said, seen, domain, place in shown(images, source):
        assert (said, domain) == (seen, place)
    total = PER_CLASS * len(source.classnames) * len(images.domains) * len(source.splits)
    assert sum(map(len, images.splits.values())) == total
    for split in SPLITS:
        assert set(images.column(split, "label")) == set(range(len(source.classnames)))
    assert images.provenance["source"] == "local copy"
    assert images.provenance["revision"]


@every_hub_set
def test_by_its_name_alone_from_the_cache(source: Source, tmp_path: Path) -> None:
    """What a machine without network does with a data set that it had loaded before."""
    copy = write_parquet(tmp_path / "copy", tables(source, per_class=3))
    in_the_cache(tmp_path, source.hub, copy)
    images = load_images(ImageSettings(name=source.name))
    assert images.provenance["source"] == f"hub: {source.hub}"
    assert images.provenance["revision"] == "a1" * 20
    assert all(said == seen for said, seen, _, _ in shown(images, source))


def test_images_stay_on_disk_and_encoded(tmp_path: Path) -> None:
    copy = write_parquet(tmp_path / "copy", tables(CATALOGUE["food101"]))
    images = load_images(ImageSettings(name="food101", path=str(copy)))
    for split in SPLITS:
        assert images.splits[split].cache_files
        assert images.splits[split].features["image"] == datasets.Image()


def test_coarse_labels_stay_with_their_images(tmp_path: Path) -> None:
    copy = write_parquet(tmp_path / "copy", tables(CATALOGUE["cifar100"]))
    images = load_images(ImageSettings(name="cifar100", path=str(copy)))
    for split in SPLITS:
        numbers = [read(row["image"])[0] % 2 for row in images.splits[split]]
        assert images.column(split, "coarse_label").tolist() == numbers
    assert "crab" in images.classnames


def numbers(counts: dict[str, int], labels: int, domains: int = 1) -> dict[str, datasets.Dataset]:
    """Tables of labels and domains only."""
    made = {}
    for split, count in counts.items():
        label, domain = np.meshgrid(np.arange(labels), np.arange(domains))
        columns = {"label": label.ravel().repeat(count), "domain": domain.ravel().repeat(count)}
        made[split] = datasets.Dataset.from_dict({k: v.tolist() for k, v in columns.items()})
    return made


@pytest.mark.parametrize(
    ("name", "published", "sizes"),
    [
        ("food101", {"train": 750, "validation": 250}, (50_500, 20_200, 30_300)),
        ("dtd", {"train": 80, "test": 40}, (2_820, 1_128, 1_692)),
    ],
)
def test_sizes_are_the_papers(
    name: str, published: dict[str, int], sizes: tuple[int, int, int]
) -> None:
    source = CATALOGUE[name]
    splits, said = holdout(numbers(published, len(source.classnames)), source, validation=0.1)
    assert tuple(map(len, splits.values())) == sizes
    assert "50/20/30" in said


def test_the_published_test_images_of_pets_stay(tmp_path: Path) -> None:
    source = CATALOGUE["oxford-pets"]
    splits, _ = holdout(numbers({"train": 100, "test": 7}, 37), source, validation=0.0)
    assert {s: len(t) for s, t in splits.items()} == {
        "train": 80 * 37,
        "validation": 20 * 37,
        "test": 7 * 37,
    }


@pytest.mark.parametrize("validation", [0.0, 0.1])
def test_missing_splits_are_cut_in_every_class_and_domain(validation: float) -> None:
    splits, said = holdout(numbers({"train": 50}, 7, domains=4), CATALOGUE["pacs"], validation)
    for split, count in (("test", 10), ("validation", round(40 * validation))):
        columns = splits[split].with_format("numpy")[:]
        _, found = np.unique([columns["label"], columns["domain"]], axis=1, return_counts=True)
        assert found.tolist() == [count] * (28 if count else 0)
    assert "test: 20% of train" in said
    again, _ = holdout(numbers({"train": 50}, 7, domains=4), CATALOGUE["pacs"], validation)
    assert all(splits[s][:] == again[s][:] for s in SPLITS)


def test_coop_splits_give_the_same_images(tmp_path: Path) -> None:
    for source in (s for s in CATALOGUE.values() if s.coop):
        layout, root = source.coop, tmp_path / source.name
        assert layout is not None
        place = root / layout.folder / layout.images
        # Numbers in the file are worthless on purpose
        listed: dict[str, list[tuple[str, int, str]]] = {"train": [], "val": [], "test": []}
        for number, name in enumerate(source.classnames):
            for split in listed:
                relative = f"{name}/{split}.png"
                (place / name).mkdir(parents=True, exist_ok=True)
                (place / relative).write_bytes(png(number, list(listed).index(split)))
                listed[split].append((relative, 0, name.replace(" ", "_")))
        (root / layout.folder / layout.split).write_text(json.dumps(listed))
        for path in (root, root / layout.folder):
            images = load_images(ImageSettings(name=source.name, path=str(path)))
            for number, split in enumerate(SPLITS):
                rows = [(read(row["image"]), row["label"]) for row in images.splits[split]]
                assert sorted(rows) == [((c, number), c) for c in range(len(source.classnames))]
        assert layout.split in images.provenance["source"]
    (place / relative).unlink()
    with pytest.raises(UsageError, match=r"1 of 141 images .* are not there"):
        load_images(ImageSettings(name="dtd", path=str(root), validation=0.0))


def write_idx(folder: Path, *, compress: bool) -> None:
    folder.mkdir()
    for prefix, count in (("train", 60), ("t10k", 20)):
        labels = np.arange(count, dtype=np.uint8) % 10
        pixels = np.repeat(labels, 28 * 28).tobytes()
        contents = {
            f"{prefix}-images-idx3-ubyte": np.array([0x803, count, 28, 28], ">u4").tobytes()
            + pixels,
            f"{prefix}-labels-idx1-ubyte": np.array([0x801, count], ">u4").tobytes()
            + labels.tobytes(),
        }
        for name, content in contents.items():
            if compress:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)


@pytest.mark.parametrize("compress", [True, False])
def test_idx_files(tmp_path: Path, compress: bool) -> None:
    write_idx(tmp_path / "idx", compress=compress)
    images = load_images(ImageSettings(name="fashion-mnist", path=str(tmp_path / "idx")))
    assert [len(images.splits[s]) for s in SPLITS] == [50, 10, 20]
    for split in SPLITS:
        for row in images.splits[split]:
            assert read(row["image"]) == (row["label"], 0)
            assert row["image"].size == (28, 28)


def test_a_cut_idx_file_is_named(tmp_path: Path) -> None:
    write_idx(tmp_path / "idx", compress=False)
    file = tmp_path / "idx" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UsageError, match=r"train-images-idx3-ubyte is not an idx file"):
        load_images(ImageSettings(name="fashion-mnist", path=str(tmp_path / "idx")))


def test_office_caltech_from_its_folders(tmp_path: Path) -> None:
    source = CATALOGUE["office-caltech10"]
    for domain, name in enumerate(["amazon", "caltech", "dslr", "webcam"]):
        write_tree(tmp_path / name, dict.fromkeys(hub_names(source), 10), domain)
    images = load_images(ImageSettings(name=source.name, path=str(tmp_path)))
    assert images.classnames == source.classnames
    assert images.domains == ("amazon", "caltech", "dslr", "webcam")
    assert [len(images.splits[s]) for s in SPLITS] == [4 * 70, 4 * 10, 4 * 20]
    for split in SPLITS:
        for row in images.splits[split]:
            assert read(row["image"]) == (row["label"], row["domain"])
    with pytest.raises(UsageError, match="office-caltech10 needs DOMAIN/CLASS"):
        load_images(ImageSettings(name=source.name, path=str(tmp_path / "dslr")))


# What goes wrong is one line that says what to do


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("cifar", "cifar10"), ("flowers", "flowers102"), ("office", "office-home")],
)
def test_an_unknown_name_lists_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(UsageError, match=rf"did you mean .*{nearest}"):
        find_source(name)


def one_line(settings: ImageSettings) -> str:
    with pytest.raises(UsageError) as caught:
        load_images(settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@every_hub_set
def test_without_network_the_local_ways_are_named(source: Source) -> None:
    said = one_line(ImageSettings(name=source.name))
    assert all(word in said for word in (source.hub, "data.path", "HF_HUB_OFFLINE=1"))


def test_a_gated_set_says_how_to_log_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise datasets.exceptions.DatasetNotFoundError("is a gated dataset on the Hub.\nLog in")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    assert "hf auth login" in one_line(ImageSettings(name="domainnet"))


def test_what_is_on_no_hub_says_so() -> None:
    assert "DOMAIN/CLASS" in one_line(ImageSettings(name="office-caltech10"))


def test_wrong_paths(tmp_path: Path) -> None:
    assert "there is nothing at" in one_line(
        ImageSettings(name="dtd", path=str(tmp_path / "absent"))
    )
    (tmp_path / "broken.parquet").write_bytes(b"no table")
    assert "cannot be read" in one_line(ImageSettings(name="dtd", path=str(tmp_path)))
    assert "part of the package" in one_line(ImageSettings(name=BUNDLED, path=str(tmp_path)))
    assert "own list" in one_line(ImageSettings(name="dtd", classnames="a,b"))


def test_a_wrong_schema_shows_both(tmp_path: Path) -> None:
    made = tables(CATALOGUE["cifar10"], per_class=1)
    renamed = {split: table.rename_column("img", "image") for split, table in made.items()}
    copy = write_parquet(tmp_path / "renamed", renamed)
    said = one_line(ImageSettings(name="cifar10", path=str(copy)))
    assert "expected columns img (Image), label (class names)" in said
    assert "found image (Image), label (ClassLabel)" in said
    copy = write_parquet(tmp_path / "split", {"train": made["train"]})
    said = one_line(ImageSettings(name="cifar10", path=str(copy)))
    assert "expected splits train, test; found train" in said


def test_numbers_for_names_are_refused() -> None:
    """nelorth/oxford-flowers has the classes '1', '10', '100', ...: no published name."""
    source = CATALOGUE["flowers102"]
    names = sorted(map(str, range(1, 103)))
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    )
    rows = {"image": [{"bytes": png(0), "path": None}], "label": [0]}
    table = datasets.Dataset.from_dict(rows, features=features)
    with pytest.raises(
        UsageError, match=r"missing 'alpine sea holly'.* and 97 more; extra '1', '10'"
    ):
        join({"train": table}, source)


def test_names_may_be_text_and_domains_numbers(tmp_path: Path) -> None:
    source = CATALOGUE["pacs"]
    made = tables(source, per_class=5)["train"]
    names, domains = hub_names(source), DOMAINS["pacs"]
    labels = [names[i] for i in made["label"]]
    made = made.remove_columns("label").add_column("label", labels)
    made = made.cast_column("domain", datasets.ClassLabel(names=domains))
    copy = write_parquet(tmp_path / "copy", {"train": made})
    images = load_images(ImageSettings(name="pacs", path=str(copy)))
    assert all((a, c) == (b, d) for a, b, c, d in shown(images, replace(source)))
