"""A bar on a terminal with the time left, below the lines of the log; a pipe gets none."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def bar_of_rounds(rounds: int) -> Iterator[None]:
    """Show how many rounds are done, from the lines that the server logs of them."""
    with bar("round", rounds) as move:
        follower = _Follower(move)
        logger = logging.getLogger("flwr.pfedmoap")
        logger.addHandler(follower)
        try:
            yield
        finally:
            logger.removeHandler(follower)


@contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar meanwhile; what it yields is called with how many are done."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda done: None
        return
    columns = (TextColumn(what), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress, _log_above():
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)


class _Follower(logging.Handler):
    """Moves a bar at each line that carries the number of a round."""

    def __init__(self, move: Callable[[int], None]) -> None:
        super().__init__(logging.INFO)
        self.move = move

    def emit(self, record: logging.LogRecord) -> None:
        """Move the bar, where the line is one of a round."""
        if (done := getattr(record, "fields", {}).get("round")) is not None:
            self.move(done)


@contextmanager
def _log_above() -> Iterator[None]:
    """Let the log write where rich puts lines above a bar: into it they would tear the bar."""
    handlers = [
        h for h in logging.getLogger("flwr").handlers if isinstance(h, logging.StreamHandler)
    ]
    before = [handler.setStream(sys.stderr) for handler in handlers]
    try:
        yield
    finally:
        for handler, stream in zip(handlers, before, strict=True):
            if stream is not None:
                handler.setStream(stream)
