"""This program's own log lines: for people as Flower writes them, or one JSON object each."""

import json
import logging
import os
import sys
import time
from datetime import UTC, datetime
from typing import Literal

LOGGER = logging.getLogger("flwr.pfedmoap")


class Slow:
    """Says how far a work is that takes longer than people wait without a word.

    After two seconds, and then each time that it has taken twice as long. As a warning, for these
    are seen where no log was set up.

    text: of the line, with % for what `at` is given.
    """

    FIRST = 2.0

    def __init__(self, text: str) -> None:
        self.text = text
        self.began = time.monotonic()
        self.next = self.FIRST

    def at(self, *numbers: object) -> None:
        """Say it, if it is time to."""
        if (taken := time.monotonic() - self.began) >= self.next:
            LOGGER.warning(self.text, *numbers)
            self.next = 2 * taken


class JsonLines(logging.Formatter):
    """Time (UTC), level and message of a record, and the fields that it was given as `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line, whatever the message holds."""
        said = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            said["traceback"] = self.formatException(record.exc_info)
        return json.dumps(said, default=str)


def set_up(log_format: Literal["text", "json"]) -> None:
    """Write lines in this format from now on, to the standard error of the process.

    Flower colours its lines; where no terminal reads them, or NO_COLOR is set, they stay plain.
    """
    for flowers in logging.getLogger("flwr").handlers:
        if hasattr(flowers, "colored"):
            flowers.colored = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    LOGGER.propagate = log_format == "text"
    for handler in [h for h in LOGGER.handlers if isinstance(h.formatter, JsonLines)]:
        LOGGER.removeHandler(handler)
    if log_format == "json":
        handler = logging.StreamHandler()
        handler.setFormatter(JsonLines())
        LOGGER.addHandler(handler)
        LOGGER.setLevel(logging.INFO)
