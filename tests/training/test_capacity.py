"""How many clients train at once: what memory and cores allow."""

from typing import Any

import pytest

from pfedmoap_flwr.engines.in_process import Workers
from pfedmoap_flwr.training import capacity, local, stacked
from support.federation import Federate, make_method
from support.works import made_works


def test_saved_bytes_grow_by_the_same_for_every_head() -> None:
    made = make_method("promptfl")
    sizes = []
    for count in (2, 3, 4):
        works = made_works(made, (8,) * count)
        stack = stacked.Stack(made, works)
        sizes.append(capacity.saved_bytes(stack, *local.first_images(works, 8), without=set()))
    assert sizes[1] - sizes[0] == sizes[2] - sizes[1] > 0


def test_memory_decides_how_many_fit(federate: Federate, monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []
    side_by_side = Workers.side_by_side

    def noted(self: Workers, requests: Any, at_once: int) -> Any:
        widths.append(at_once)
        return side_by_side(self, requests, at_once)

    monkeypatch.setattr(Workers, "side_by_side", noted)
    monkeypatch.setattr(capacity, "cores", lambda: 3)
    for memory, expected in ((1, 1), (10**12, 3)):
        widths.clear()
        monkeypatch.setattr(capacity, "memory", lambda device, memory=memory: memory)
        federate(f"{memory}/run", clients_at_once=0, num_server_rounds=1)
        # introduction, evaluation, training, evaluation
        assert widths == [1, 3, expected, 3]


def test_what_a_step_keeps_is_counted_without_the_frozen_weights() -> None:
    made = make_method("promptfl")
    works = made_works(made, (8,))
    stack, batch = stacked.Stack(made, works), local.first_images(works, 8)
    weights = list(made.clip.model.parameters())
    places = {p.untyped_storage().data_ptr() for p in weights}
    with_all = capacity.saved_bytes(stack, *batch, without=set())
    without = capacity.saved_bytes(stack, *batch, without=places)
    used = sum(p.untyped_storage().nbytes() for p in weights)
    assert 0 < without < with_all <= without + used
