"""A SuperLink that is being started again, as what follows a run meets it."""

from collections.abc import Sequence
from typing import Any

import pytest

from pfedmoap_flwr.deploy import submit
from pfedmoap_flwr.deploy.submit import through_outages
from pfedmoap_flwr.errors import RunFailed

LIST = ("list", "--run-id", "1")


class SuperLink:
    """Does not answer the first questions. Keeps what it was asked."""

    def __init__(self, silent: int) -> None:
        self.silent = silent
        self.asked: list[str] = []

    def __call__(self, words: Sequence[str]) -> dict[str, Any]:
        self.asked.append(words[0])
        if len(self.asked) <= self.silent:
            raise RunFailed(f"flwr {words[0]}: unavailable")
        return {"runs": []}


def test_it_is_asked_of_a_run_until_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "ASK_AGAIN_SECONDS", 0.0)
    superlink = SuperLink(silent=2)
    assert through_outages(superlink)(LIST) == {"runs": []}
    assert superlink.asked == ["list"] * 3


def test_an_outage_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "OUTAGE_SECONDS", 0.1)
    monkeypatch.setattr(submit, "ASK_AGAIN_SECONDS", 0.06)
    superlink = SuperLink(silent=99)
    with pytest.raises(RunFailed, match=r"^flwr list: unavailable$"):
        through_outages(superlink)(LIST)
    assert len(superlink.asked) > 1


def test_a_run_is_submitted_once() -> None:
    superlink = SuperLink(silent=1)
    with pytest.raises(RunFailed, match=r"^flwr run: unavailable$"):
        through_outages(superlink)(("run", "app"))
    assert superlink.asked == ["run"]
