"""pfedmoap report: tables and pages of any runs."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from pfedmoap_flwr import tracking
from pfedmoap_flwr.cli.say import say
from pfedmoap_flwr.report import render
from pfedmoap_flwr.report.build import Wishes, build
from pfedmoap_flwr.report.collect import collect
from pfedmoap_flwr.report.diagram import MISSING, can_draw
from pfedmoap_flwr.report.document import Report


def report_on(
    folders: Sequence[Path],
    wishes: Wishes,
    form: render.Format | None,
    out: Path | None,
    tracker: str,
    console: Console,
) -> None:
    """Print a report of runs, or write it into a folder: in one form, or without one in all.

    tracker: is told all rounds of each run first; "": none.

    Raises UsageError where there is no run, or the folder cannot be written, or no such tracker.
    """
    collection = collect(folders)
    for run in collection.runs if tracker else ():
        tracking.send(run.folder, tracker)
        say(console, f"{run.folder.name}: sent to {tracker}")
    report = build(collection, wishes)
    if out is None and form not in (None, "terminal"):
        console.out(render.printed(report, form), highlight=False, end="")
        return
    if form in (None, "terminal"):
        show(report, console)
    if out is not None:
        for each in [form] if form else render.FORMATS:
            if each != "terminal":
                for path in render.write(report, each, out):
                    say(console, str(path))


def report_comparison(root: Path, console: Console) -> None:
    """Print the report with which a comparison ends, and leave its page in the folder."""
    report = build(collect([root]), Wishes())
    show(report, console)
    render.write(report, "html", root)


def show(report: Report, console: Console) -> None:
    """Print a report's tables, and what is missing for its diagram."""
    render.print_report(report, console)
    if report.ranked and not can_draw():
        say(console, MISSING)
