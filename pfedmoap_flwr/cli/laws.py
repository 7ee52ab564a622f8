"""pfedmoap check-method: the tests of the laws, run on one method."""

import importlib.util
import re
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console

from pfedmoap_flwr.cli.say import say
from pfedmoap_flwr.errors import UsageError

LAW = re.compile(r"test_(\d+)_")
OF_THE_AUTHOR = 16
OTHERS = "6 (Ray and deployment), 9 (a neutral point), 16 (numbers from elsewhere)"
PLACES = (Path(__file__).parents[2] / "tests", Path(__file__).parents[1] / "law_tests")
"""Where the tests lie in a clone, and in a wheel."""


class Tally:
    """A plugin of pytest: takes the tests of one method alone, and counts how each law ended."""

    def __init__(self, method: str, console: Console) -> None:
        self.method = method
        self.console = console
        self.passed = Counter[int]()
        self.broken: dict[int, list[str]] = {}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Keep what is tested with every method, for this one."""
        items[:] = [
            item
            for item in items
            if (law := LAW.match(item.name))
            and int(law[1]) != OF_THE_AUTHOR
            and (call := getattr(item, "callspec", None))
            and call.params.get("method") == self.method
        ]

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Count one step of a test; setting up may fail too."""
        law = int(LAW.match(report.nodeid.rpartition("::")[2])[1])  # type: ignore[index]
        if report.failed:
            name = report.nodeid.rpartition("::")[2]
            crash = getattr(report.longrepr, "reprcrash", None)
            said = str(crash.message if crash else report.longrepr).splitlines()
            self.broken.setdefault(law, []).append(f"{name}: {said[0] if said else 'failed'}")
        elif report.when == "call":
            self.passed[law] += 1

    def verdict(self) -> bool:
        """Print a line a law, and what is not checked; return whether all hold."""
        for law in sorted({*self.passed, *self.broken}):
            word = "BROKEN" if law in self.broken else "holds"
            lines = self.broken.get(law, [])
            count = self.passed[law] + len(lines)
            self._say(f"law {law:2}  {word:6}  {count} test{'s' * (count > 1)}")
            for line in lines:
                self._say(f"        {line}")
        self._say(f"not checked here, to be shown by tests of its own: {OTHERS}")
        if self.broken:
            self._say(f"{self.method} breaks law {', '.join(map(str, sorted(self.broken)))}")
        return bool(self.passed) and not self.broken

    def _say(self, text: str) -> None:
        say(self.console, text)


def check_laws(method: str, console: Console) -> bool:
    """Run the laws' tests on a method that this process knows; return whether all hold.

    Raises UsageError where pytest is not installed, or the tests did not come along.
    """
    if importlib.util.find_spec("pytest") is None:
        raise UsageError("check-method needs pytest: pip install pytest")
    folder = next((place for place in PLACES if (place / "laws").is_dir()), None)
    if folder is None:
        raise UsageError("check-method needs the tests of the laws, of a clone or a wheel")
    import pytest

    tally = Tally(method, console)
    words = ["-p", "no:cacheprovider", "-p", "no:terminal", "-p", "no:xdist", "-p", "no:warnings"]
    words += ["-o", "addopts=", "--rootdir", str(folder)]
    console.print(f"checking {method}; a minute or two", highlight=False)
    status = pytest.main([*words, str(folder / "laws")], plugins=[tally])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise UsageError(f"the tests of the laws could not run on {method} (pytest: {status!r})")
    return tally.verdict()
