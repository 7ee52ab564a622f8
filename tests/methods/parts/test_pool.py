"""The server lends each client the right prompts: checked against slow, independent searches."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from pfedmoap_flwr.methods.parts import nearest
from pfedmoap_flwr.methods.parts.pool import Selection, select_experts
from pfedmoap_flwr.randomness import torch_generator

SELECTIONS: list[Selection] = ["knn", "random", "farthest"]

# Prompts (2, 2) of few different whole numbers: many distances are equal
prompts = st.lists(st.integers(-2, 2), min_size=4, max_size=4)
pools = st.dictionaries(st.integers(0, 40), prompts, min_size=1, max_size=12)


def generator_of(client: int) -> torch.Generator:
    return torch_generator(0, client)


def select(
    pool: dict[int, Tensor], client: int, num_experts: int, selection: Selection = "knn"
) -> list[int]:
    chosen = select_experts(pool, [client], num_experts, selection, generator_of)
    assert chosen.keys() == {client}
    return chosen[client]


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
        return select_experts(pool, [3], 2, "random", lambda client: torch_generator(*parts))[3]

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


# Many clients at once: bounds must change nothing but the time

# What the bounds are computed in. "medium" allows less exact products, so float64 is taken, as on
# CUDA
PRECISIONS = {"float32": "highest", "float64": "medium"}
forced = hypothesis_settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(params=PRECISIONS)
def bounds(request: pytest.FixtureRequest) -> Iterator[None]:
    """Choose what the bounds are computed in."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(PRECISIONS[request.param])
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of few prompts."""
    monkeypatch.setattr(nearest, "BLOCK_NUMBERS", 64)


def brute_force(
    pool: Mapping[int, Tensor],
    num_experts: int,
    selection: Selection,
    clients: Sequence[int] | None = None,
) -> dict[int, list[int]]:
    """These clients' experts, or all clients', in float64, one at a time."""
    chosen = {}
    for client in pool if clients is None else clients:
        others = sorted(set(pool) - {client})
        differences = [(pool[o].double() - pool[client].double()).flatten() for o in others]
        squares = torch.stack(differences).square().sum(1) if others else torch.empty(0)
        order = squares.argsort(stable=True, descending=selection == "farthest")
        chosen[client] = [others[i] for i in order[:num_experts].tolist()]
    return chosen


def assert_exact(pool: Mapping[int, Tensor], num_experts: int) -> None:
    for selection in ("knn", "farthest"):
        chosen = select_experts(pool, list(pool), num_experts, selection, generator_of)
        assert chosen == brute_force(pool, num_experts, selection)


@pytest.mark.usefixtures("bounds", "blocks")
@forced
@given(
    pool=st.dictionaries(st.integers(0, 90), prompts, min_size=1, max_size=60),
    num_experts=st.integers(0, 14),
    unit=st.sampled_from([1.0, 2.0**-30, 2.0**-70, 2.0**-140, 2.0**62, 2.0**126]),
    shift=st.sampled_from([0.0, 1.0, 1000.0]),
)
def test_ties_of_any_size_at_any_place(
    pool: dict[int, list[int]], num_experts: int, unit: float, shift: float
) -> None:
    assert_exact({c: p * unit + shift for c, p in as_tensors(pool).items()}, num_experts)


@pytest.mark.slow
@pytest.mark.usefixtures("bounds", "blocks")
@pytest.mark.parametrize("shift", [0.0, 1.0, 300.0])
@forced
@given(seed=st.integers(0, 2**32), step=st.sampled_from([1e-7, 1e-5, 1e-3, 0.1]))
def test_near_ties_below_the_resolution_of_the_filter(shift: float, seed: int, step: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(3, 2, 6, generator=generator) + shift
    noise = torch.randn(24, 2, 6, generator=generator)
    assert_exact({c: base[c % 3] * (1 + step * noise[c]) for c in range(24)}, 4)


@pytest.mark.usefixtures("bounds", "blocks")
@pytest.mark.parametrize("num_clients", [2, 3, 5, 9, 10, 11, 15, 16, 17, 64])
def test_the_borders_of_blocks(num_clients: int) -> None:
    # Blocks of five prompts
    generator = torch.Generator().manual_seed(num_clients)
    ids = torch.randperm(1000, generator=generator)[:num_clients].tolist()
    for num_experts in (1, 4, 5, 6, 63):
        assert_exact({i: torch.randn(3, 4, generator=generator) for i in ids}, num_experts)


@pytest.mark.slow
@pytest.mark.parametrize("spread", [0.0, 1e-6, 0.03, 1.0])
@pytest.mark.parametrize("farthest", [False, True])
@pytest.mark.usefixtures("bounds")
def test_many_clients_equal_scikit_learn(
    farthest: bool, spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From one point, by narrow clusters, to none; the bounds do not tell the narrow ones apart."""
    monkeypatch.setattr(nearest, "BLOCK_NUMBERS", 2**15)
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 8, 64))
    table = np.repeat(centres, 250, axis=0) + spread * rng.normal(size=(1000, 8, 64))
    rows = torch.from_numpy(table.astype(np.float32))
    flat = rows.flatten(1).double().numpy()
    clients = list(range(0, 1000, 9))
    found = nearest.nearest(dict(enumerate(rows)), clients, 9, farthest=farthest)
    search = NearestNeighbors(n_neighbors=1000, algorithm="brute").fit(flat)
    far, order = search.kneighbors(flat[clients])
    for client, distances, ranked in zip(clients, far, order, strict=True):
        distance = dict(zip(ranked.tolist(), distances.tolist(), strict=True))
        others = sorted(distance.keys() - {client}, key=lambda i: (distance[i], i))
        expected = others[-9:][::-1] if farthest else others[:9]
        assert [distance[i] for i in found[client]] == pytest.approx(
            [distance[i] for i in expected], rel=1e-12, abs=1e-5
        )
        if spread == 1.0:
            assert found[client] == expected


def test_random_for_many_equals_random_for_each() -> None:
    pool = {client: torch.zeros(2) for client in range(3, 90, 3)}
    clients = list(pool)[::2]
    chosen = select_experts(pool, clients, 9, "random", generator_of)
    assert chosen == {client: select(pool, client, 9, "random") for client in clients}
    for client in clients:
        others = sorted(set(pool) - {client})
        order = torch.randperm(len(others), generator=generator_of(client))
        assert chosen[client] == [others[i] for i in order[:9].tolist()]


def test_clients_are_served_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "MAX_CLIENTS", 7)
    generator = torch.Generator().manual_seed(0)
    assert_exact({client: torch.randn(4, generator=generator) for client in range(30)}, 3)


class LazyPool(Mapping[int, Tensor]):
    """Counts how often each prompt is read."""

    def __init__(self, table: Tensor) -> None:
        self.table = table
        self.reads: Counter[int] = Counter()

    def __getitem__(self, client: int) -> Tensor:
        self.reads[client] += 1
        return self.table[client]

    def __contains__(self, client: object) -> bool:
        return client in range(len(self.table))

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self.table)))

    def __len__(self) -> int:
        return len(self.table)


def test_a_lazy_pool_is_read_once_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    pool = LazyPool(torch.randn(3000, 16, 32, generator=generator))
    clients = list(range(0, 3000, 100))
    stacked = []
    stack = torch.stack

    def counted(rows: list[Tensor], **options: Any) -> Tensor:
        stacked.append(len(rows))
        return stack(rows, **options)

    monkeypatch.setattr(nearest, "BLOCK_NUMBERS", 2**16)
    monkeypatch.setattr(torch, "stack", counted)
    found = nearest.nearest(pool, clients, 5)
    monkeypatch.undo()
    assert max(stacked) <= 128
    # Once in its block, and once more those that search; one prompt tells the size of all
    assert pool.reads.total() == len(pool) + len(clients) + 1
    flat = pool.table.flatten(1).double()
    for client in clients:
        order = (flat - flat[client]).square().sum(1).argsort(stable=True)
        assert found[client] == order[order != client][:5].tolist()


def count_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows are made float64 at a time from now on, which is done to measure them."""
    measured: list[int] = []
    double = Tensor.double

    def counted(rows: Tensor) -> Tensor:
        measured.append(len(rows))
        return double(rows)

    monkeypatch.setattr(Tensor, "double", counted)
    return measured


@pytest.mark.usefixtures("bounds")
def test_memory_stays_small_where_no_bound_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = count_rows(monkeypatch)
    monkeypatch.setattr(nearest, "BLOCK_NUMBERS", 2**9)
    # Less apart than float32 can bound, and in the order that is worst: ever nearer
    first, last = torch.full((4,), 0.1), torch.full((4,), 7.0)
    drift = torch.tensor([0, 0, 0, 2.0**-26])
    pool = {client: first + (1500 - client) * drift for client in range(1500)} | {1500: last}
    clients = [0, 700, 1499, 1500]
    found = nearest.nearest(pool, clients, 2)
    monkeypatch.undo()
    assert found == brute_force(pool, 2, "knn", clients)
    assert sum(measured) > 1500
    assert max(measured) <= 8


@pytest.mark.parametrize("unit", [1.0, 1e-200, 1e200])
@pytest.mark.parametrize("shift", [0.0, 1.0])
@pytest.mark.usefixtures("blocks")
def test_float64_prompts_of_any_size(unit: float, shift: float) -> None:
    # Squares of 1e200 overflow, of 1e-200 vanish: all distances are equal
    rows = torch.randint(-2, 3, (40, 2, 2), generator=torch.Generator().manual_seed(0))
    assert_exact({client: row.double() * unit + shift for client, row in enumerate(rows)}, 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("blocks")
def test_prompts_of_few_bits(dtype: torch.dtype) -> None:
    # Rounded to few bits, many are equal
    rows = torch.randn(60, 2, 2, generator=torch.Generator().manual_seed(0)).mul(3).round()
    assert_exact({client: row.div(3).to(dtype) for client, row in enumerate(rows)}, 7)


@pytest.mark.slow
@pytest.mark.usefixtures("bounds", "blocks")
@pytest.mark.parametrize("offset", [1.1, 1.7, 3.3])
def test_sums_of_many_numbers_round_far_more_than_prompts_differ(offset: float) -> None:
    # Rounding goes the same way at every step, as the numbers are nearly equal
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(-9, 10, (9, 2**18), generator=generator) * 2.0**-12
    assert_exact({client: steps[client] + offset * (client % 2) for client in range(9)}, 1)


@pytest.mark.slow
@pytest.mark.usefixtures("bounds", "blocks")
@pytest.mark.parametrize("unit", [2.0**-63, 2.0**-72, 2.0**-75])
def test_squares_below_the_range_of_float32(unit: float) -> None:
    generator = torch.Generator().manual_seed(0)
    assert_exact({i: unit * torch.randn(4, generator=generator) for i in range(70)}, 4)


def test_one_huge_prompt_spoils_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    pool = {client: torch.randn(64, generator=generator) for client in range(2000)}
    pool[1000] = torch.full((64,), 3e38)
    clients = list(range(0, 2000, 100))
    monkeypatch.setattr(nearest, "BLOCK_NUMBERS", 2**14)
    measured = count_rows(monkeypatch)
    found = nearest.nearest(pool, clients, 3)
    monkeypatch.undo()
    assert found == brute_force(pool, 3, "knn", clients)
    # All of its own, and few of the others'
    assert 2000 <= sum(measured) < 4000


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_equal_prompts_stay_equal_in_any_company(seed: int) -> None:
    # PyTorch's two threads sum a long row that stands alone in another order
    rows = torch.randn(2, 40_000, generator=torch.Generator().manual_seed(seed))
    pool = {client: rows[min(client, 1)] for client in range(7)}
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert select(pool, 0, 6) == [1, 2, 3, 4, 5, 6]
    finally:
        torch.set_num_threads(threads)


def test_autocast_does_not_change_the_choice() -> None:
    generator = torch.Generator().manual_seed(0)
    pool = {client: torch.randn(64, generator=generator) for client in range(300)}
    with torch.autocast("cpu", torch.bfloat16):
        found = nearest.nearest(pool, list(pool), 5)
    assert found == brute_force(pool, 5, "knn")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
@pytest.mark.parametrize("farthest", [False, True])
def test_cuda_chooses_what_the_cpu_chooses(farthest: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    pool = {client: torch.randn(16, 32, generator=generator) for client in range(3000)}
    clients = list(range(0, 3000, 10))
    on_cuda = nearest.nearest(pool, clients, 9, farthest=farthest, device="cuda")
    assert on_cuda == nearest.nearest(pool, clients, 9, farthest=farthest, device="cpu")


def test_every_client_must_have_a_prompt() -> None:
    pool = {client: torch.zeros(2) for client in range(4)}
    for selection in SELECTIONS:
        with pytest.raises(KeyError):
            select_experts(pool, [1, 9], 2, selection, generator_of)
        assert select_experts(pool, [], 2, selection, generator_of) == {}
