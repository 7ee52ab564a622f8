"""Templates of class prompts: learned vectors, the class's name and plain words, in any order.

    {soft:4} {class}, {soft:2} drawn as an emoji.

| field | what stands there |
|---|---|
| `{class}` | the class's name; exactly once |
| `{soft:4}` | 4 learned vectors, drawn from N(0, 0.02^2) |
| `{soft:a photo of}` | learned vectors that start as these words, one for each of their tokens |
| `{soft:2#a}`, `{soft:a photo#a}` | the same vectors wherever a field says the same with `#a` |

All the rest is plain words. They are tokenised as the sentence that they are without the learned
vectors: "{class} {soft:8}." is read as "<name>." and the vectors are put in after the name's last
token. That is how CoOp lays out its prompts (KaiyangZhou/CoOp, trainers/coop.py).
"""

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from pfedmoap_flwr.clip.settings import Position

CLASS = "{class}"
ALLOWED = (
    "a template may have {class}, exactly once, {soft:4} (4 learned vectors), {soft:a photo of} "
    "(learned vectors that start as these words), either with an id as in {soft:4#a} (the same "
    "vectors wherever the field stands), and plain words"
)
Count = Callable[[str], int]
"""How many tokens some words have, without SOS and EOT."""


@dataclass(frozen=True)
class Template:
    """Where learned vectors, plain words and the class's name stand in a prompt.

    Attributes:
        text: as it was written, for messages.
        parts: plain words, "{class}" somewhere among them, and ranges of the learned vectors. A
            vector may stand in several places.
        starts: words that vectors start as, and the first of these vectors.
    """

    text: str
    parts: tuple[str | range, ...]
    starts: tuple[tuple[int, str], ...] = ()

    @property
    def soft(self) -> list[range]:
        """The places of learned vectors, in order: which ones stand there."""
        return [part for part in self.parts if isinstance(part, range)]

    @property
    def n_ctx(self) -> int:
        """M, the number of different learned vectors."""
        return max((part.stop for part in self.soft), default=0)

    def fill(self, name: str) -> tuple[str, list[str]]:
        """Return a class's sentence without learned vectors, and what of it is before each."""
        text, before = "", []
        for part in self.parts:
            if isinstance(part, range):
                before.append(text)
            else:
                text += part.replace(CLASS, name, 1)
        return text, before

    def up_to_class(self) -> tuple[str, int]:
        """Return the plain words before the class's name, and how many learned vectors are."""
        at = next(i for i, p in enumerate(self.parts) if isinstance(p, str) and CLASS in p)
        words = "".join(part for part in self.parts[: at + 1] if isinstance(part, str))
        vectors = sum(len(part) for part in self.parts[:at] if isinstance(part, range))
        return words.partition(CLASS)[0].rstrip(), vectors

    def first(self, n_ctx: int) -> "Template":
        """Return the same template with the first n_ctx (<= M) of its learned vectors alone."""
        cut = (p if isinstance(p, str) else p[: max(0, n_ctx - p.start)] for p in self.parts)
        return replace(self, parts=tuple(part for part in cut if part))

    def plain(self, filler: str) -> str:
        """Return the sentence with words in the vectors' places, and {} for the class's name.

        They are the words that the vectors start as, or `filler` for each vector.
        """
        starts, text = dict(self.starts), ""
        for part in self.parts:
            if isinstance(part, range):
                text += f" {starts.get(part.start, ' '.join([filler] * len(part)))}"
            else:
                text += " " * _is_word(part) + part.replace(CLASS, "{}")
        return text.strip()


def parse(text: str, count: Count) -> Template:
    """Read a template; `count` says how many vectors the words of a field start.

    Raises ValueError that names what is wrong and what is allowed.
    """
    parts: list[str | range] = []
    starts: list[tuple[int, str]] = []
    named: dict[str, tuple[str, range]] = {}
    n_ctx = 0
    for i, piece in enumerate(re.split(r"(\{[^{}]*\})", text)):  # the odd ones are fields
        if i % 2 == 0 and re.search(r"[{}]", piece):
            raise _wrong(f"a brace without its other half in '{piece.strip()}'")
        if i % 2 == 0 or piece == CLASS:
            parts.append(piece)
            continue
        what, name = _read_soft(piece)
        if name not in named:
            length = int(what) if what.isdecimal() else count(what)
            vectors = range(n_ctx, n_ctx + length)
            n_ctx = vectors.stop
            if not what.isdecimal():
                starts.append((vectors.start, what))
            if name:
                named[name] = what, vectors
        elif named[name][0] != what:
            raise _wrong(f"#{name} is both '{named[name][0]}' and '{what}'")
        else:
            vectors = named[name][1]
        parts.append(vectors)
    if parts.count(CLASS) != 1:
        raise _wrong(f"{CLASS} stands there {parts.count(CLASS)} times")
    if not n_ctx:
        raise _wrong("there is nothing to learn")
    return Template(text, _spaced(parts), tuple(starts))


def coop(n_ctx: int, ctx_init: str, position: Position, count: Count) -> Template:
    """Return CoOp's template: n_ctx vectors, or those that start as the words of `ctx_init`.

    The name stands after the vectors ("end"), between their halves ("middle") or before them
    ("front"), and a full stop comes last.
    """
    n_ctx = count(ctx_init) if ctx_init else n_ctx
    half = n_ctx // 2
    text = {
        "end": f"{{soft:{n_ctx}}} {CLASS}.",
        "middle": f"{{soft:{half}}} {CLASS} {{soft:{n_ctx - half}}}.",
        "front": f"{CLASS} {{soft:{n_ctx}}}.",
    }["front" if position == "middle" and not half else position]
    return replace(parse(text, count), starts=((0, ctx_init),) if ctx_init else ())


def _read_soft(field: str) -> tuple[str, str]:
    """Return what a field says, a number or words, and its id."""
    found = re.fullmatch(r"\{soft:([^#]*)(?:#(\w+))?\}", field)
    if found is None:
        raise _wrong(f"'{field}' is no field")
    what, name = " ".join(found[1].split()), found[2] or ""
    number = re.fullmatch("[0-9]{1,18}", what)
    if (number and int(what) == 0) or not (number or re.search(r"[^\W\d_]", what)):
        raise _wrong(f"'{field}' has neither a number from 1 on nor words")
    return what, name


def _spaced(parts: list[str | range]) -> tuple[str | range, ...]:
    """Return parts whose words, joined, are the sentence without vectors.

    A vector that is taken out leaves no space before a full stop, and never joins two words.
    """
    spaced: list[str | range] = []
    begun = False
    for is_vectors, group in itertools.groupby(parts, key=lambda part: isinstance(part, range)):
        if is_vectors:
            spaced += group
        elif words := "".join(map(str, group)):
            gap = begun and (words[0].isspace() or _is_word(words))
            spaced += [" " * gap + words.strip()] if words.strip() else []
            begun = begun or bool(words.strip())
    return tuple(spaced)


def _is_word(text: str) -> bool:
    return re.match(r"[\w{]", text) is not None


def _wrong(what: str) -> ValueError:
    return ValueError(f"{what}; {ALLOWED}")
