"""Local training."""

import torch

from pfedmoap_flwr.training import local
from support.federation import make_method
from support.works import made_works


def test_a_phase_without_epochs_moves_nothing() -> None:
    method = make_method("promptfl")
    (work, *_) = made_works(method)
    before = work.head.state()
    assert local.train(method, [work], [(0, ("ctx",))]) == {0: None}
    torch.testing.assert_close(work.head.state(), before, rtol=0, atol=0)
    losses = local.train(method, [work], [(1, ("ctx",)), (0, ("ctx",))])
    assert losses[0] is not None
