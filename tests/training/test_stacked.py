"""What cannot be stacked is found out, each way that went wrong without a word before."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pfedmoap_flwr.methods.base import Head, Method, Work
from pfedmoap_flwr.training import local, stacked
from support.federation import make_method
from support.works import made_works


def refused(method: Method[Any, Any], works: list[Work[Any]], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        stacked.check_stackable(stacked.Stack(method, works), *local.first_images(works, 2))


def test_a_loss_that_writes_into_a_buffer_is_refused() -> None:
    method = make_method("promptfl")
    works = made_works(method)
    for work in works:
        work.head.register_buffer("count", torch.zeros(()))

    def counting(head: Any, features: Tensor, labels: Tensor, received: Any) -> Tensor:
        head.count += 1
        return F.cross_entropy(head(features), labels)

    method.loss = counting
    refused(method, works, "writes into a buffer")


def test_a_plain_attribute_that_differs_in_the_last_head_is_refused() -> None:
    method = make_method("promptfl")
    works = made_works(method)
    works[-1].head.logit_scale *= 1.5
    refused(method, works, "not each one's own")


def test_a_loss_that_counts_the_rows_which_fill_up_a_batch_is_refused() -> None:
    method = make_method("promptfl")

    def small_term(head: Head, features: Tensor, labels: Tensor, received: Any) -> Tensor:
        return F.cross_entropy(head(features), labels) + 0.01 * features.square().mean()

    method.loss = small_term
    refused(method, made_works(method), "not each one's own")


def test_heads_with_other_phases_are_not_alike() -> None:
    method = make_method("promptfl")
    one, other = made_works(method)[:2]
    assert stacked.likeness(method, one) == stacked.likeness(method, other)

    def schedule(head: Head, epochs: int) -> Any:
        return [(epochs, ("ctx",))] if head is one.head else [(1, ("ctx",)), (epochs, ("ctx",))]

    method.schedule = schedule
    assert stacked.likeness(method, one) != stacked.likeness(method, other)
