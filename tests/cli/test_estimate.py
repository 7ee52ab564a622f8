"""What a dry run says of a step: measured on made-up images, and of all that is trained in turn."""

import pytest

from pfedmoap_flwr import methods
from pfedmoap_flwr.cli.estimate import estimate
from pfedmoap_flwr.config import parse
from support.tiny import TINY


@pytest.mark.parametrize("method", ["pfedpt", "sgpt"])
def test_memory_does_not_depend_on_which_tensors_are_trained_last(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = methods.load(method)
    settings = parse({**TINY, "method": method})
    forwards = estimate(settings).saved
    schedule = kind.schedule
    monkeypatch.setattr(kind, "schedule", lambda *words: schedule(*words)[::-1])
    assert estimate(settings).saved == forwards
