"""The HTML page: nothing from outside, no name becomes markup; and in a browser, it works."""

import html
import json
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pfedmoap_flwr.report import render
from pfedmoap_flwr.report.build import Wishes, build
from pfedmoap_flwr.report.collect import collect
from support.run_folders import write_run

SCRIPT = "<script>alert(1)</script>"
IMAGE = "<img src=x onerror=alert(1)>"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of nine runs with hostile names of classes, domains, settings and a folder."""
    root = tmp_path_factory.mktemp("runs")
    heights = {"coop": 0.6, "promptfl": 0.5, "fedprox": 0.4}
    flat = {"data.num-clients": 2, "data.template": f"{SCRIPT} {{}}"}
    for method, height in heights.items():
        for seed in range(3):
            rows = [[0.2, 0.2], [height, height + 0.1 * seed]]
            write_run(
                root / f"{method}{seed}",
                method,
                seed,
                rows,
                flat=flat,
                classnames=(SCRIPT, "$x$ & y"),
                domain="</script><script>alert(2)</script>",
            )
    write_run(root / IMAGE, "fedamp", 0, [[0.2, 0.2]] * 2, end=SCRIPT)
    # A second template, so that the settings are part of the data sets' names in the charts
    other = {**flat, "data.template": "{}"}
    write_run(root / "other", "coop", 0, [[0.2, 0.2]] * 2, flat=other)
    [path] = render.write(build(collect([root]), Wishes()), "html", root / "page")
    return path


class Elements(HTMLParser):
    """How often each tag is there, attributes that call something, and the text by tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.calls: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.open.append(tag)
        self.calls += [
            (name, value) for name, value in attrs if name in ("src", "href", "xlink:href")
        ]
        self.calls += [(name, value) for name, value in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.append((self.open[-1], data))


def test_a_page_asks_nobody_and_no_name_becomes_markup(page: Path) -> None:
    found = Elements(page.read_text())
    assert (found.tags["script"], found.tags["img"], found.tags["link"]) == (2, 0, 0)
    # Marks of the diagram's own drawing
    assert all(value and value.startswith("#") for _, value in found.calls)
    said = "".join(data for tag, data in found.texts if tag == "td")
    assert SCRIPT in said
    assert IMAGE in said
    assert "url(http" not in page.read_text()


def test_the_data_of_the_charts_are_json_without_an_end_of_script(page: Path) -> None:
    [said] = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page.read_text())
    assert "<" not in said
    runs = json.loads(said)["runs"]
    assert len(runs) == 10
    assert any(SCRIPT in run["dataset"] for run in runs)
    [run] = [r for r in runs if (r["method"], r["seed"]) == ("coop", 2)]
    assert run["personal-accuracy"] == [[0.2, 0.2], pytest.approx([0.6, 0.8])]


def test_a_run_alone_has_a_page(tmp_path: Path) -> None:
    write_run(tmp_path / "run", "pfedmoap", 0, [[0.2, 0.2], [0.5, 0.6]])
    [path] = render.write(build(collect([tmp_path / "run"]), Wishes()), "html", tmp_path / "page")
    assert "<h1>pfedmoap on emoji-domains</h1>" in path.read_text()
    assert "55.0" in path.read_text()


def test_no_script_where_nothing_is_done(tmp_path: Path) -> None:
    write_run(tmp_path / "run", "pfedmoap", 0, [[0.2, 0.2]], end="half")
    [path] = render.write(build(collect([tmp_path]), Wishes()), "html", tmp_path / "page")
    assert "half done: round 0 of 1" in path.read_text()


def test_very_many_points_are_means_and_the_page_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "run", "pfedmoap", 0, [[0.2, 0.2], [0.5, 0.6]])
    monkeypatch.setattr("pfedmoap_flwr.report.build.MOST_POINTS", 7)
    report = build(collect([tmp_path]), Wishes())
    [run] = report.curves["runs"]
    assert run["clients"] == []
    assert run["personal-accuracy"] == [[0.2], [0.55]]
    assert "show means over clients" in report.notes[-1]


STEPS = """
const out = {};
const $ = (selector) => document.querySelector(selector);
const all = (selector) => [...document.querySelectorAll(selector)];
const shown = (id) => all(`#table-${id} tbody tr`).filter((row) => !row.hidden);
const change = (name, value) => {
  $("#filter").elements[name].value = value;
  $("#filter").dispatchEvent(new Event("change"));
};
out.wide = [document.documentElement.scrollWidth, innerWidth];
out.sets = [...$("#filter").elements.dataset.options].map((option) => option.value);
change("dataset", out.sets.find((name) => name.includes("script")));
out.dots = all("#strip circle").length;
out.lines = all("#rounds polyline").length;
const head = all("#table-clients th").find((th) => th.dataset.key.startsWith("personal"));
head.querySelector("button").click();
out.highest = shown("clients")[0].cells[6].textContent;
head.querySelector("button").click();
out.lowest = shown("clients")[0].cells[6].textContent;
const dot = $("#strip circle");
dot.dispatchEvent(new PointerEvent("pointerenter", { clientX: 5, clientY: 5 }));
out.hint = $("#hint").textContent;
dot.dispatchEvent(new PointerEvent("pointerleave"));
out.gone = $("#hint").hidden;
change("client", "1");
out.clientRows = shown("clients").length;
out.clientDots = all("#strip circle").length;
document.querySelector("#methods input[value=coop]").click();
out.methodRows = shown("clients").length;
out.methodLines = all("#rounds polyline").length;
out.scripts = document.scripts.length;
const pre = document.createElement("pre");
pre.id = "found";
pre.textContent = JSON.stringify(out);
document.body.append(pre);
"""


def browse(page: Path, width: int) -> dict[str, Any]:
    """Open a page in a browser, take the steps, and return what was seen."""
    assert BROWSER
    text = page.read_text().replace("</body>", f"<script>{{{STEPS}}}</script></body>")
    copy = page.with_name(f"steps-{width}.html")
    copy.write_text(text)
    done = subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
            *(f"--window-size={width},800", f"--user-data-dir={page.parent / str(width)}"),
            copy.as_uri(),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    [found] = re.findall(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    return dict(json.loads(html.unescape(found)))


@pytest.mark.processes
@pytest.mark.skipif(not BROWSER, reason="no Chromium or Chrome on the PATH")
@pytest.mark.parametrize("width", [1200, 500])
def test_the_page_works_in_a_browser(page: Path, width: int) -> None:
    seen = browse(page, width)
    needed, there = seen["wide"]
    assert needed <= there, "nothing but tables is wider than a phone"
    assert len(seen["sets"]) == 2
    assert (seen["lines"], seen["dots"]) == (3, 18)
    assert (seen["highest"], seen["lowest"]) == ("80.0", "40.0")
    assert seen["hint"] == "coop, seed 0, client 0: 60.0 %"
    assert seen["gone"]
    assert (seen["clientRows"], seen["clientDots"]) == (9, 9)
    assert (seen["methodRows"], seen["methodLines"]) == (6, 2)
    assert seen["scripts"] == 3, "the page's two and this test's"
