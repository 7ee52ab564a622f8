"""Build the `emoji-domains` data set: the same things drawn by five vendors.

Sources (npm, fetched by `npm pack`): `emoji-datasource` for the Unicode names and subgroups, and
one package per vendor in `DOMAINS`. Every drawing becomes a 64x64 RGB image on white; the class is
the Unicode subgroup; the split is by emoji, the same for all vendors.
"""

import argparse
import io
import json
import random
import subprocess
import tarfile
import textwrap
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import cairosvg
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image, ImageDraw, ImageFont

SIZE = 64
NAMES_PACKAGE = "emoji-datasource@16.0.0"


class Vendor(NamedTuple):
    """Where one vendor's drawings lie: npm package, folder inside it, file suffix."""

    package: str
    folder: str
    suffix: str


DOMAINS: dict[str, Vendor] = {
    "noto": Vendor("emoji-datasource-google@16.0.0", "img/google/64", ".png"),
    "twemoji": Vendor("emoji-datasource-twitter@16.0.0", "img/twitter/64", ".png"),
    "openmoji": Vendor("openmoji@17.0.0", "color/svg", ".svg"),
    "fluent-3d": Vendor("@lobehub/fluent-emoji-3d@1.1.0", "assets", ".webp"),
    "fluent-flat": Vendor("@lobehub/fluent-emoji-flat@1.1.0", "assets", ".svg"),
}

CLASS_NAMES: dict[str, str] = {
    "alphanum": "letter button",
    "animal-bird": "bird",
    "animal-bug": "insect or bug",
    "animal-mammal": "land animal",
    "animal-marine": "sea animal",
    "arrow": "arrow sign",
    "av-symbol": "media player button",
    "body-parts": "body part",
    "book-paper": "book and paper",
    "clothing": "hat and clothing",
    "computer": "computer",
    "drink": "drink",
    "emotion": "comic symbol",
    "event": "party and holiday",
    "face-concerned": "worried face",
    "face-neutral-skeptical": "neutral face",
    "face-smiling": "smiling face",
    "face-unwell": "sick face",
    "food-asian": "asian food",
    "food-fruit": "fruit",
    "food-prepared": "prepared meal",
    "food-sweet": "sweet dessert",
    "food-vegetable": "vegetable",
    "game": "game and toy",
    "geometric": "geometric shape",
    "hand-fingers-open": "open hand",
    "heart": "heart",
    "household": "household item",
    "keycap": "number key",
    "light & video": "camera and light",
    "mail": "mail and envelope",
    "money": "money",
    "musical-instrument": "musical instrument",
    "office": "office supplies",
    "other-symbol": "symbol",
    "person": "portrait of a person",
    "person-activity": "person in action",
    "person-fantasy": "fantasy character",
    "person-gesture": "person gesturing",
    "person-role": "person at work",
    "person-sport": "person doing sport",
    "place-building": "building",
    "place-other": "city scenery",
    "plant-flower": "flower",
    "plant-other": "plant and leaf",
    "religion": "religious symbol",
    "sky & weather": "sky and weather",
    "sport": "sports equipment",
    "time": "clock",
    "tool": "tool",
    "transport-air": "aircraft",
    "transport-ground": "road and rail vehicle",
    "transport-sign": "public sign",
    "warning": "warning sign",
    "zodiac": "zodiac sign",
}

SPLITS: dict[str, float] = {"train": 0.6, "validation": 0.2, "test": 0.2}
# Code points that turn one emoji into a near copy: joiner, gender signs, people, facing right.
VARIANT_MARKS = {"200d", "2640", "2642", "27a1", "1f468", "1f469", "1f9d1"}


class Emoji(NamedTuple):
    """One emoji: lower-case code points without the variation selector, name, Unicode subgroup."""

    code: str
    name: str
    subgroup: str


def plain_code(stem: str) -> str:
    """`1F441-FE0F` -> `1f441`: vendors disagree on case and on the variation selector."""
    return "-".join(part for part in stem.lower().split("-") if part != "fe0f")


def fetch(package: str, work: Path) -> Path:
    """Folder of an npm package (`NAME@VERSION`), downloaded into `work` unless it lies there."""
    folder = work / "npm" / package.replace("/", "_")
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", package, "--silent", "--pack-destination", str(folder.parent)]
        packed = subprocess.run(command, check=True, capture_output=True, text=True)
        archive = folder.parent / packed.stdout.split()[-1]
        partial = folder.with_name(folder.name + ".partial")
        with tarfile.open(archive) as tar:
            tar.extractall(partial, filter="data")
        archive.unlink()
        partial.rename(folder)
    (root,) = folder.iterdir()
    return root


def read_emoji(work: Path) -> list[Emoji]:
    """All emoji of `emoji-datasource` but flags and skin tones, in Unicode order."""
    records = json.loads((fetch(NAMES_PACKAGE, work) / "emoji.json").read_text())
    records = [r for r in records if r["category"] not in ("Flags", "Component")]
    records.sort(key=lambda record: record["sort_order"])
    return [Emoji(plain_code(r["unified"]), r["name"].lower(), r["subcategory"]) for r in records]


def vendor_files(vendor: Vendor, work: Path) -> dict[str, Path]:
    """Plain code -> file, for every drawing of one vendor."""
    folder = fetch(vendor.package, work) / vendor.folder
    return {plain_code(path.stem): path for path in sorted(folder.glob("*" + vendor.suffix))}


def draw_on_white(path: Path, size: int = SIZE) -> Image.Image:
    """One drawing (PNG, WebP or SVG) as a size x size RGB image on white."""
    if path.suffix == ".svg":
        data = cairosvg.svg2png(bytestring=path.read_bytes(), output_width=2 * size)
        drawing = Image.open(io.BytesIO(data)).convert("RGBA")
    else:
        drawing = Image.open(path).convert("RGBA")
    drawing.thumbnail((size, size), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (size, size), "white")
    corner = ((size - drawing.width) // 2, (size - drawing.height) // 2)
    canvas.alpha_composite(drawing, corner)
    return canvas.convert("RGB")


def split_by_emoji(emoji: list[Emoji], seed: int) -> dict[str, str]:
    """Code -> split, stratified by subgroup.

    Gender and direction variants of one emoji are almost the same drawing, so they stay together:
    the largest families are dealt out first, each to the split furthest behind its share.
    """
    families: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for item in emoji:
        parts = item.code.split("-")
        stem = "-".join(part for part in parts if part not in VARIANT_MARKS) or item.code
        families[item.subgroup][stem].append(item.code)
    split_of: dict[str, str] = {}
    for subgroup, members in sorted(families.items()):
        groups = list(members.values())
        random.Random(f"{seed}/{subgroup}").shuffle(groups)
        groups.sort(key=len, reverse=True)
        missing = {name: share * sum(map(len, groups)) for name, share in SPLITS.items()}
        for group in groups:
            split = max(missing, key=missing.__getitem__)
            missing[split] -= len(group)
            split_of |= dict.fromkeys(group, split)
    return split_of


def encode(image: Image.Image, quality: int) -> bytes:
    """WebP bytes; method 6 is the slowest and smallest."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, method=6)
    return buffer.getvalue()


Drawings = dict[tuple[str, str], Image.Image]  # by (domain, code)


def contact_sheet(drawings: Drawings, columns: list[Emoji]) -> Image.Image:
    """Rows: domains. Columns: emoji of different classes, labelled by class name."""
    cell, left, top = 92, 110, 66
    sheet = Image.new("RGB", (left + cell * len(columns), top + cell * len(DOMAINS)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for x, item in enumerate(columns):
        label = "\n".join(textwrap.wrap(CLASS_NAMES[item.subgroup], width=11))
        pen.text((left + cell * x + cell // 2, top - 6), label, "black", font, "md", align="center")
    for y, domain in enumerate(DOMAINS):
        pen.text((left - 12, top + cell * y + cell // 2), domain, "black", font, "rm")
        for x, item in enumerate(columns):
            drawing = drawings[domain, item.code].resize((80, 80), Image.Resampling.BICUBIC)
            sheet.paste(drawing, (left + cell * x + 6, top + cell * y + 6))
    return sheet


def build(work: Path, out: Path, sheet: Path, min_members: int, quality: int, seed: int) -> None:
    """Write {train,validation,test}.parquet under `out`, the contact sheet, and print counts."""
    files = {domain: vendor_files(vendor, work) for domain, vendor in DOMAINS.items()}
    emoji = [e for e in read_emoji(work) if all(e.code in drawn for drawn in files.values())]
    members = Counter(e.subgroup for e in emoji)
    emoji = [e for e in emoji if members[e.subgroup] >= min_members]
    subgroups = sorted({e.subgroup for e in emoji})
    names = [CLASS_NAMES[subgroup] for subgroup in subgroups]
    assert len(set(names)) == len(names), "class names must be distinct"

    split_of = split_by_emoji(emoji, seed)
    drawings: Drawings = {
        (d, e.code): draw_on_white(files[d][e.code]) for d in DOMAINS for e in emoji
    }
    features = Features(
        image=ImageFeature(),
        label=ClassLabel(names=names),
        domain=ClassLabel(names=list(DOMAINS)),
        emoji=Value("string"),
        name=Value("string"),
    )
    out.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    for split in SPLITS:
        chosen = sorted((e for e in emoji if split_of[e.code] == split), key=lambda e: e.code)
        assert seen.isdisjoint(e.code for e in chosen), f"an emoji of {split} is in another split"
        assert {e.subgroup for e in chosen} == set(subgroups), f"a class is missing in {split}"
        seen |= {e.code for e in chosen}
        rows = [
            {
                "image": {"bytes": encode(drawings[domain, e.code], quality), "path": None},
                "label": subgroups.index(e.subgroup),
                "domain": number,
                "emoji": e.code,
                "name": e.name,
            }
            for number, domain in enumerate(DOMAINS)
            for e in chosen
        ]
        partial = out / f"{split}.parquet.partial"
        Dataset.from_list(rows, features=features).to_parquet(partial)
        partial.rename(out / f"{split}.parquet")
        print(f"{split:>10}: {len(chosen)} emoji x {len(DOMAINS)} domains = {len(rows)} images")
    print(f"{len(names)} classes: " + ", ".join(names))

    first = {e.subgroup: e for e in reversed(emoji)}
    step = len(subgroups) / 12
    columns = [first[subgroups[int(step * (i + 0.5))]] for i in range(12)]
    sheet.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(drawings, columns).quantize(192).save(sheet, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for downloads, reused")
    parser.add_argument("--out", type=Path, default=Path("pfedmoap_flwr/assets/emoji-domains"))
    parser.add_argument("--sheet", type=Path, default=Path("docs/images/emoji-domains.png"))
    parser.add_argument("--min-members", type=int, default=10, help="smallest class, in emoji")
    parser.add_argument("--quality", type=int, default=95, help="WebP quality")
    parser.add_argument("--seed", type=int, default=0)
    build(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
