"""Write docs/methods/README.md and its figure: all methods, by what travels and what stays.

python scripts/methods_page.py

Numbers are counted from what each method sends and keeps with the default settings; families are
those that the methods' pages name.
"""

import math
import re
from pathlib import Path

import matplotlib.pyplot as plt

from pfedmoap_flwr import methods
from pfedmoap_flwr.cli.methods import Row, describe

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "methods"
PAGE = PAGES / "README.md"
FIGURE = ROOT / "docs" / "images" / "methods.svg"
NONE = 70
"""Where the figure has what is 0, which logarithms have no place for."""
HEAD = """# The methods

`pfedmoap methods` prints this table for any settings; here they are the defaults. **down** and
**up** are numbers (floats) that travel for one client in a round after its first; **stays** are the
parameters that never leave a client. Each page says how faithful a method is, and to what.
`python scripts/methods_page.py` wrote this page.

![Methods by what a client sends and what it keeps](../images/methods.svg)
"""


def family(method: str) -> str:
    """Return the family that a method's page names."""
    found = re.search(r"^\*\*Family: (.*?)\.\*\*$", (PAGES / f"{method}.md").read_text(), re.M)
    if found is None:
        raise SystemExit(f"docs/methods/{method}.md has no line **Family: ...**")
    return found[1]


def rows() -> dict[str, list[Row]]:
    """Return every method's row by family, in the order of the families' sizes."""
    by_family: dict[str, list[Row]] = {}
    for name in methods.names():
        by_family.setdefault(family(name), []).append(describe(name, {}))
    return dict(sorted(by_family.items(), key=lambda item: -len(item[1])))


def page(by_family: dict[str, list[Row]]) -> str:
    """Return the page: a table for each family."""
    lines = [HEAD]
    for name, members in by_family.items():
        lines += [
            f"## {name[0].upper()}{name[1:]}\n",
            "| method | down | up | stays | reads | fidelity | source | test |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in members:
            test = f"[test](../../tests/paper/test_{row.name}.py)"
            stays = f"{row.kept:,}: {row.stays}" if row.kept else "-"
            cells = f"{row.down:,}", f"{row.up:,}", stays, row.reading, row.fidelity, row.source
            lines.append(f"| [{row.name}]({row.name}.md) | {' | '.join(cells)} | {test} |")
        lines.append("")
    return "\n".join(lines)


def draw(by_family: dict[str, list[Row]], path: Path) -> None:
    """Draw each method at what it sends (right) and keeps (up), both in numbers and logarithms."""
    figure, axes = plt.subplots(figsize=(11, 7.5), layout="constrained")
    taken: dict[tuple[int, int], int] = {}
    for name, members in by_family.items():
        places = [(max(row.up, NONE), max(row.kept, NONE)) for row in members]
        points = axes.scatter(*zip(*places, strict=True), label=name)
        for row, place in zip(members, places, strict=True):
            # Names of methods that lie side by side stand one above the other
            near = round(2.5 * math.log10(place[0])), round(5 * math.log10(place[1]))
            taken[near] = taken.get(near, 0) + 1
            axes.annotate(
                row.name,
                place,
                xytext=(5, 12 * taken[near] - 8),
                textcoords="offset points",
                fontsize=8,
                color=points.get_facecolor()[0],
            )
    axes.set(xscale="log", yscale="log", xlim=(NONE / 1.5, 6e5))
    ticks = [NONE, 1e3, 1e4, 1e5]
    axes.set_xticks(ticks, ["none", *(f"{tick:,.0f}" for tick in ticks[1:])])
    axes.set_yticks(ticks, ["none", *(f"{tick:,.0f}" for tick in ticks[1:])])
    axes.set_xlabel("numbers a client sends in a round")
    axes.set_ylabel("numbers that never leave a client")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right", fontsize=8)
    plt.rcParams["svg.hashsalt"] = "methods"  # the same bytes each time
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    found = rows()
    PAGE.write_text(page(found))
    draw(found, FIGURE)
