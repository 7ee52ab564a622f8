"""What a person sees on a terminal, and what a pipe gets."""

import io
import logging
from collections.abc import Iterator

import pytest
from rich.console import Console
from rich.text import Text

from pfedmoap_flwr import logs
from pfedmoap_flwr.cli import main as cli
from pfedmoap_flwr.cli.bar import bar_of_rounds

LOGGER = logging.getLogger("flwr.pfedmoap")


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(params=["text", "json"])
def log_format(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param
    logs.set_up("text")


def test_the_bar_follows_the_rounds(monkeypatch: pytest.MonkeyPatch, log_format: str) -> None:
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    with bar_of_rounds(4):
        logs.set_up(log_format)  # type: ignore[arg-type]  # as a run does, after the bar began
        for done in range(5):
            LOGGER.info("round %d/4", done, extra={"fields": {"round": done}})
    said = Text.from_ansi(terminal.getvalue()).plain
    assert "round 4/4 \N{BOX DRAWINGS HEAVY HORIZONTAL}" in said, "the bar itself, not the log"


def test_a_pipe_gets_no_bar_and_no_colours(capsys: pytest.CaptureFixture[str]) -> None:
    with bar_of_rounds(4):
        LOGGER.info("round 1/4", extra={"fields": {"round": 1}})
    assert "\N{BOX DRAWINGS HEAVY HORIZONTAL}" not in capsys.readouterr().err
    logs.set_up("text")
    flowers = [h for h in logging.getLogger("flwr").handlers if hasattr(h, "colored")]
    assert flowers
    record = logging.LogRecord("flwr", logging.WARNING, "", 1, "said", None, None)
    assert not any("\x1b" in handler.format(record) for handler in flowers)


def test_a_list_of_data_sets_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert Console().width == 80
    assert cli.main(["data", "list"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
