"""Images of one patient: in one split, at one client."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pfedmoap_flwr.data import SPLITS
from pfedmoap_flwr.data.federated import federated
from pfedmoap_flwr.data.groups import GROUP
from pfedmoap_flwr.data.images import load_images
from pfedmoap_flwr.data.settings import DataSettings, ImageSettings
from pfedmoap_flwr.errors import UsageError
from support.copies import png

PATIENTS, MOST = 60, 6
PARTITIONS = ["iid", "dirichlet", "dirichlet-domain", "shards"]


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """A CSV of 60 patients with 1 to 6 images each, some of two classes."""
    rng = np.random.default_rng(0)
    rows = []
    for patient in range(PATIENTS):
        for shot in range(int(rng.integers(1, MOST + 1))):
            file = f"p{patient:02}_{shot}.png"
            (tmp_path / file).write_bytes(png(patient, shot))
            label = ("ill", "well")[(patient + (shot == 5)) % 2]
            rows.append({"path": file, "label": label, "patient": f"p{patient}"})
    rows = [rows[i] for i in rng.permutation(len(rows))]
    path = tmp_path / "images.csv"
    write(path, rows)
    return path


def write(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def settings(path: Path, **changes: object) -> DataSettings:
    said: dict[str, Any] = {"name": "folder", "path": str(path), "num_clients": 4}
    said |= {"min_examples": 2, "alpha": 5.0, "group_column": "patient"}
    return DataSettings(**{**said, **changes})


@pytest.mark.parametrize("partition", PARTITIONS)
def test_a_group_is_at_one_client_and_in_one_split(partition: str, listed: Path) -> None:
    held = federated(settings(listed, partition=partition), 0)
    seen: dict[str, tuple[str, int]] = {}
    count = 0
    for client in held.clients.values():
        for split in SPLITS:
            groups = held.images.splits[split].select(client.rows[split])[GROUP][:]
            count += len(groups)
            for group in groups:
                assert seen.setdefault(group, (split, client.client_id)) == (
                    split,
                    client.client_id,
                )
            if split == "train":
                assert len(set(groups)) >= 2
    assert count == len(read(listed)) == sum(map(len, held.images.splits.values()))
    assert len(seen) == PATIENTS
    assert {split for split, _ in seen.values()} == set(SPLITS)


def test_without_the_setting_patients_are_divided(listed: Path) -> None:
    with pytest.raises(UsageError, match=r"data.group-column names one of groups, as patients"):
        federated(settings(listed, group_column=""), 0)
    rows = [{k: v for k, v in row.items() if k != "patient"} for row in read(listed)]
    write(listed, rows)
    held = federated(settings(listed, group_column=""), 0)
    patients = [
        {Path(i["path"]).name[:3] for i in images.cast_column("image", raw())["image"]}
        for images in held.images.splits.values()
    ]
    assert patients[0] & patients[2]


def raw() -> Any:
    import datasets

    return datasets.Image(decode=False)


def test_a_pattern_finds_groups_in_paths(listed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tree"
    for row in read(listed):
        (folder / row["label"]).mkdir(parents=True, exist_ok=True)
        (tmp_path / row["path"]).rename(folder / row["label"] / row["path"])
    said: dict[str, Any] = {"name": "folder", "path": str(folder)}
    images = load_images(ImageSettings(**said, group_pattern=r"/(p\d+)_"))
    groups = [set(table[GROUP]) for table in images.splits.values()]
    assert len(set.union(*groups)) == sum(map(len, groups)) == PATIENTS
    with pytest.raises(UsageError, match=r"data.group-pattern='\^x': finds no group in "):
        load_images(ImageSettings(**said, group_pattern="^x"))
    with pytest.raises(UsageError, match="a folder has no columns; list its images in a CSV"):
        load_images(ImageSettings(**said, group_column="patient"))


def test_published_splits_that_divide_a_group_are_refused(listed: Path) -> None:
    rows = read(listed)
    twice = next(r["patient"] for r in rows if sum(o["patient"] == r["patient"] for o in rows) > 1)
    for number, row in enumerate(rows):
        row["split"] = "test" if number % 3 == 0 and row["patient"] != twice else "train"
    own = [row for row in rows if row["patient"] == twice]
    own[0]["split"], own[1]["split"] = "train", "test"
    for row in rows:
        if row["patient"] != twice:
            row["split"] = "train"
    write(listed, rows)
    with pytest.raises(UsageError, match=rf"group '{twice}' lies in train and in test"):
        load_images(settings(listed))


def test_a_row_without_a_group_is_named(listed: Path) -> None:
    rows = read(listed)
    rows[3]["patient"] = ""
    write(listed, rows)
    with pytest.raises(UsageError, match=r"line 5: needs a path, a label, a patient, a split"):
        load_images(settings(listed))


def test_shots_are_images_and_not_groups(listed: Path) -> None:
    held = federated(settings(listed, shots=3, partition="iid"), 0)
    for client in held.clients.values():
        labels = held.images.column("train", "label")[client.rows["train"]]
        assert np.bincount(labels).max() == 3
