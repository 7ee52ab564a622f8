"""Make folders of images of three sites from the bundled set, to rehearse a deployment with them.

    python scripts/three_sites.py sites

Each site has the drawings of another vendor, a folder per class. They differ in size, and the
smallest one lacks a class. Nothing is downloaded.
"""

import sys
from pathlib import Path

from datasets import load_dataset

from pfedmoap_flwr.assets import asset

CLASSES = ("bird", "fruit", "musical instrument", "building", "flower", "clock")
SITES = {
    "north": ("noto", 40, ()),
    "south": ("twemoji", 20, ()),
    "east": ("openmoji", 10, ("clock",)),
}
"""By name: whose drawings, how many of a class at most, and which classes it lacks."""


def main(root: Path) -> None:
    """Write the folders, and print what each holds and what a run must be told."""
    splits = ("train", "validation", "test")
    rows = load_dataset(
        "parquet", data_files=[str(asset(f"emoji-domains/{split}.parquet")) for split in splits]
    )["train"]
    names, vendors = rows.features["label"].names, rows.features["domain"].names
    for site, (vendor, most, lacking) in SITES.items():
        counts = dict.fromkeys((name for name in CLASSES if name not in lacking), 0)
        of_vendor = [i for i, v in enumerate(rows["domain"]) if vendors[v] == vendor]
        for row in rows.select(of_vendor):
            name = names[row["label"]]
            if counts.get(name, most) < most:
                folder = root / site / name
                folder.mkdir(parents=True, exist_ok=True)
                row["image"].save(folder / f"{counts[name]:03d}.png")
                counts[name] += 1
        print(f"{site}: {sum(counts.values())} images of {len(counts)} classes")
    print(f'data.classnames="{",".join(CLASSES)}"')


if __name__ == "__main__":
    main(Path(sys.argv[1]))
