"""The server lends each client the right prompts: checked against slow, independent searches."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from pfedmoap_flwr.pool import Selection, select_experts
from pfedmoap_flwr.randomness import torch_generator

SELECTIONS: list[Selection] = ["knn", "random", "farthest"]

# Prompts (2, 2) of few different whole numbers: many distances are equal
prompts = st.lists(st.integers(-2, 2), min_size=4, max_size=4)
pools = st.dictionaries(st.integers(0, 40), prompts, min_size=1, max_size=12)


def select(
    pool: dict[int, Tensor], client: int, num_experts: int, selection: Selection = "knn"
) -> list[int]:
    return select_experts(pool, client, num_experts, selection, torch_generator(0, client))


def as_tensors(pool: dict[int, list[int]]) -> dict[int, Tensor]:
    return {client: torch.tensor(p, dtype=torch.float32).view(2, 2) for client, p in pool.items()}


@given(pool=pools, num_experts=st.integers(0, 14), data=st.data())
def test_knn_and_farthest_equal_a_search_in_whole_numbers(
    pool: dict[int, list[int]], num_experts: int, data: st.DataObject
) -> None:
    client = data.draw(st.sampled_from(sorted(pool)))
    distance = {
        other: sum((a - b) ** 2 for a, b in zip(pool[client], prompt, strict=True))
        for other, prompt in pool.items()
        if other != client
    }
    # sorted() keeps the lower id first where distances are equal
    nearest = sorted(sorted(distance), key=lambda other: distance[other])
    farthest = sorted(sorted(distance), key=lambda other: -distance[other])
    tensors = as_tensors(pool)
    assert select(tensors, client, num_experts) == nearest[:num_experts]
    assert select(tensors, client, num_experts, "farthest") == farthest[:num_experts]


@pytest.mark.parametrize("shape", [(16, 32), (5, 4, 8)], ids=["shared", "class-specific"])
@pytest.mark.parametrize("seed", range(5))
def test_knn_equals_scikit_learn(shape: tuple[int, ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    clients = rng.choice(1000, size=60, replace=False).tolist()
    table = rng.normal(scale=0.02, size=(60, *shape)).astype(np.float32)
    pool = {client: torch.from_numpy(row) for client, row in zip(clients, table, strict=True)}
    flat = table.reshape(60, -1).astype(np.float64)
    search = NearestNeighbors(n_neighbors=10, algorithm="brute").fit(flat)
    # Without a query scikit-learn leaves out each point itself
    for client, found in zip(clients, search.kneighbors(return_distance=False), strict=True):
        assert select(pool, client, 10) == [clients[i] for i in found]


@pytest.mark.parametrize("selection", SELECTIONS)
@given(pool=pools, num_experts=st.integers(0, 14), data=st.data())
def test_any_selection_is_of_others_without_repeats(
    selection: Selection, pool: dict[int, list[int]], num_experts: int, data: st.DataObject
) -> None:
    client = data.draw(st.sampled_from(sorted(pool)))
    chosen = select(as_tensors(pool), client, num_experts, selection)
    assert len(chosen) == len(set(chosen)) == min(num_experts, len(pool) - 1)
    assert set(chosen) <= pool.keys() - {client}


def test_equal_prompts_go_by_the_lower_id_and_never_to_oneself() -> None:
    pool = {client: torch.ones(2, 2) for client in (7, 3, 9, 1)}
    for selection in ("knn", "farthest"):
        assert select(pool, 3, 3, selection) == [1, 7, 9]
        assert select(pool, 7, 2, selection) == [1, 3]
        many = {client: torch.full((2, 2), float(client % 2)) for client in range(5000)}
        same, different = list(range(2, 5000, 2)), list(range(1, 5000, 2))
        expected = same + different if selection == "knn" else different + same
        assert select(many, 0, 5000, selection) == expected


def test_small_differences_of_large_prompts_are_seen() -> None:
    # They would drown in a^2 - 2ab + b^2
    pool = {client: torch.full((4, 4), 1000.0) for client in range(4)}
    for client, step in ((1, 3e-4), (2, 1e-4), (3, 2e-4)):
        pool[client][0, 0] += step
    assert pool[1][0, 0] > pool[3][0, 0] > pool[2][0, 0]
    assert select(pool, 0, 3) == [2, 3, 1]
    assert select(pool, 0, 3, "farthest") == [1, 3, 2]
    # Squares of 1 and 1 + 1e-10, which float32 cannot tell apart
    pool = {0: torch.zeros(2), 1: torch.tensor([1, 1e-5]), 2: torch.tensor([1.0, 0])}
    assert select(pool, 0, 2) == [2, 1]


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_pool_of_few(selection: Selection) -> None:
    pool = {4: torch.zeros(2, 2), 2: torch.ones(2, 2)}
    assert select(pool, 4, 0, selection) == []
    assert select(pool, 4, 9, selection) == [2]
    assert select({4: torch.zeros(2, 2)}, 4, 9, selection) == []
    for missing in ({}, pool):
        with pytest.raises(KeyError):
            select(missing, 5, 9, selection)


@pytest.mark.parametrize("order", [range(10), range(9, -1, -1)])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_order_in_which_uploads_came_has_no_say(selection: Selection, order: range) -> None:
    entries = {client: torch.full((2, 2), float(client % 4)) for client in range(10)}
    shuffled = {client: entries[client] for client in order}
    assert select(shuffled, 5, 4, selection) == select(entries, 5, 4, selection)


def test_random_is_a_function_of_its_generator_and_fair() -> None:
    pool = {client: torch.zeros(2, 2) for client in range(8)}

    def draw(*parts: int) -> list[int]:
        return select_experts(pool, 3, 2, "random", torch_generator(*parts))

    torch.manual_seed(0)
    once = [draw(0, number) for number in range(700)]
    torch.manual_seed(1)
    assert [draw(0, number) for number in range(700)] == once
    assert [draw(1, number) for number in range(700)] != once
    counts = Counter(other for chosen in once for other in chosen)
    assert counts.keys() == set(range(8)) - {3}
    # 700 draws of 2 of 7: 200 each, standard deviation 12
    assert all(150 < count < 250 for count in counts.values())


def test_random_does_not_look_at_the_prompts() -> None:
    near = {client: torch.full((2, 2), float(client)) for client in range(8)}
    far = {client: torch.full((2, 2), -float(client**2)) for client in range(8)}
    assert select(near, 3, 4, "random") == select(far, 3, 4, "random")
