"""What a table's images are: which cannot be read, and which hold more than is read of them."""

import contextlib
import hashlib
import io
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

import datasets
from PIL import Image

from pfedmoap_flwr.cache import cache_folder
from pfedmoap_flwr.data.pixels import as_rgb, frames, is_deep
from pfedmoap_flwr.files import replace
from pfedmoap_flwr.logs import Slow

MOST_PIXELS = 50_000_000  # 150 MB decoded; above 89 million Pillow warns of a bomb


@dataclass(frozen=True)
class Scan:
    """What was found of a table's images.

    broken: (path, reason) by row, of those that cannot be decoded or are too large. deep: how many
    have pixels of more than 8 bits. several: how many files hold more images than the one read.
    """

    broken: dict[int, tuple[str, str]]
    deep: int
    several: int


def scan(table: datasets.Dataset) -> Scan:
    """Look at every image of a table.

    Each is decoded once; the answer is kept in the cache folder until a file changes.
    """
    names = [str(image["path"] or f"row {row}") for row, image in enumerate(_encoded(table))]
    marks = [_mark(image) for image in _encoded(table)]
    digest = hashlib.sha256(json.dumps([names, marks, MOST_PIXELS]).encode()).hexdigest()
    path = cache_folder() / f"scanned-{digest}.json"
    with contextlib.suppress(OSError, ValueError, KeyError):
        said = json.loads(path.read_text())
        broken = {int(row): (names[int(row)], why) for row, why in said["broken"].items()}
        return Scan(broken, said["deep"], said["several"])
    slow, looks = Slow("decoding images to find broken ones: %d of %d so far"), []
    for row, image in enumerate(_encoded(table)):
        slow.at(row, len(table))
        looks.append(_look(image))
    reasons = {row: look for row, look in enumerate(looks) if isinstance(look, str)}
    good = [look for look in looks if not isinstance(look, str)]
    deep, several = sum(deep for deep, _ in good), sum(several for _, several in good)
    with contextlib.suppress(OSError):  # then it is decoded again next time
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, json.dumps({"broken": reasons, "deep": deep, "several": several}))
    return Scan({row: (names[row], why) for row, why in reasons.items()}, deep, several)


def _encoded(table: datasets.Dataset) -> Iterator[dict[str, bytes | str | None]]:
    images = table.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
    for batch in images.with_format(None).iter(batch_size=100):
        yield from batch["image"]


def _mark(image: dict[str, bytes | str | None]) -> str:
    """Return what changes when an image does: a hash, or a file's size and time."""
    if isinstance(content := image["bytes"], bytes):
        return hashlib.sha256(content).hexdigest()
    with contextlib.suppress(OSError, ValueError):
        status = os.stat(str(image["path"]))
        return f"{status.st_size} {status.st_mtime_ns}"
    return "absent"


def _look(image: dict[str, bytes | str | None]) -> str | tuple[bool, bool]:
    """Return why an image cannot be decoded; or whether it is deep, and one of several."""
    content = image["bytes"]
    try:
        # A pipe is never read to its end, and opening a device may do something
        if not isinstance(content, bytes) and not stat.S_ISREG(os.stat(str(image["path"])).st_mode):
            return "not a regular file"
        file = io.BytesIO(content) if isinstance(content, bytes) else str(image["path"])
        with Image.open(file) as picture:
            if (pixels := picture.width * picture.height) > MOST_PIXELS:
                return f"{pixels} pixels; at most {MOST_PIXELS} are read"
            as_rgb(picture)
            return is_deep(picture), frames(picture) > 1
    except FileNotFoundError:
        return "not there, or its name is not UTF-8"
    except Exception as error:  # Pillow's decoders raise anything
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
