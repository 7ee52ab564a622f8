"""The K nearest prompts of many clients in one pass over a pool: filter, then refine. Exact.

Filter: block by block, a matrix product of rounded prompts bounds every distance from below and
above; a pair lives while its lower bound does not exceed the K-th smallest upper bound. Refine:
distances of the few survivors in float64, best first (multi-step search, Seidl and Kriegel 1998).

Shapes: N pool, P clients that search, K neighbours, D numbers in a prompt, R prompts in a block.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

# A block of prompts stays in the cache, as do its distances
BLOCK_NUMBERS, BLOCK_PAIRS = 2**21, 2**20
# Clients of one pass, and numbers in their prompts
MAX_CLIENTS, MAX_OWN = 4096, 2**25
# Below so many numbers to compare the filter costs more than it saves
SMALL = 2**22
# Survivors per neighbour at which the filter is held to be too coarse for these prompts
CROWD = 32
# Partial sums of so many products keep float32's own error small
PARTIAL = 512
# Slack for the rounding of the bounds themselves, and for products below float32's range
EPSILON, TINY, MAX_SQUARE = 2.0**-20, 2.0**-60, 2.0**120


def nearest(
    pool: Mapping[int, Tensor], clients: Sequence[int], count: int, *, farthest: bool = False
) -> dict[int, list[int]]:
    """Return for every client the ids of the `count` others with the nearest prompts, in order.

    By l2 distance in float64; equal distances go by the lower id. `farthest`: the reverse order.
    All prompts have one shape and one dtype, and are finite. Each is read once for the filter (per
    4,096 clients), and again where it survives; beside the pool, memory grows with P alone.

    Raises KeyError where a client has no prompt.
    """
    for client in clients:
        if client not in pool:
            raise KeyError(client)
    ids = sorted(pool)
    count = min(count, len(ids) - 1)
    found: dict[int, list[int]] = {client: [] for client in clients}
    if count < 1 or not found:
        return found
    width = min(MAX_CLIENTS, max(1, MAX_OWN // pool[ids[0]].numel()))
    for start in range(0, len(clients), width):
        found |= _Search(pool, ids, clients[start : start + width], count, farthest).run()
    return found


def filter_dtype(num_pairs: int, prompts: Tensor) -> torch.dtype | None:
    """Return what the filter computes in; None: refine every pair, which is cheaper for few."""
    if prompts.dtype != torch.float32 or num_pairs * prompts.shape[1] < SMALL:
        return None
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


@dataclass(frozen=True)
class _Rounded:
    """Points (n, D) in the filter's dtype, their squared lengths (n,), and how far each moved."""

    values: Tensor
    square: Tensor
    moved: Tensor

    @classmethod
    def of(cls, points: Tensor, dtype: torch.dtype) -> "_Rounded":
        """Round float32 points, which are overwritten."""
        values = points.to(dtype)
        size = points.shape[1]
        # .float() is faster than a norm of low precision
        parts = values.float().unflatten(1, (-1, gcd(size, PARTIAL)))
        square = torch.linalg.vector_norm(parts, dim=2).square_().sum(1)
        # Too long for sums in float32: nothing is known of it
        square[square > MAX_SQUARE] = torch.inf
        # What subtracting the centre rounded off, by which a result is wrong by 2^-24 of itself
        moved = square.sqrt() * 2.0**-22
        if dtype != torch.float32:
            moved += torch.linalg.vector_norm(points.sub_(values), dim=1)
        return cls(values, square, moved * (1 + EPSILON + size * 2.0**-23) + TINY * size**0.5)

    def distances(self, other: "_Rounded") -> tuple[Tensor, Tensor]:
        """Return squared distances (n, m) of the rounded points, and what they may be off by."""
        size = self.values.shape[1]
        if self.values.dtype == torch.float32:
            terms, products = PARTIAL, _product_by_parts(self.values, other.values)
        else:
            terms, products = size, (self.values @ other.values.t()).float()
        squares = self.square.unsqueeze(1) + other.square
        # n terms summed in any order are off by n 2^-24 of |x||y| <= (x^2 + y^2) / 2; twice that
        # covers hardware that truncates, and PARTIAL the lengths
        share = (terms + PARTIAL + size / PARTIAL + 16) * 2.0**-23
        error = squares * share + size * TINY**2
        if self.values.dtype != torch.float32:
            # The product itself comes back rounded
            error.add_(products.abs(), alpha=2.0**-6)
        return squares.sub_(products, alpha=2), error


def _product_by_parts(a: Tensor, b: Tensor) -> Tensor:
    """Return a b^T of float32 with short sums, whose rounding has a small bound."""
    total = a.new_zeros(len(a), len(b))
    for mine, theirs in zip(a.split(PARTIAL, 1), b.split(PARTIAL, 1), strict=True):
        total.addmm_(mine, theirs.t())
    return total


class _Shortlist:
    """Pairs (client, prompt) that may be among the K nearest: low <= key <= high of each.

    A key is the squared distance, negative for the farthest. Pairs of a client stand in ascending
    order of the prompt. `limit` (P,): an upper bound of each client's K-th smallest key.
    """

    def __init__(self, num_clients: int, count: int) -> None:
        self.count = count
        self.limit = torch.full((num_clients,), torch.inf, dtype=torch.float64)
        self.who = self.index = torch.empty(0, dtype=torch.int64)
        self.low = self.high = torch.empty(0, dtype=torch.float64)

    def add(self, who: Tensor, index: Tensor, low: Tensor, high: Tensor) -> None:
        """Append pairs of prompts that come after all known ones."""
        self.who, self.index = torch.cat([self.who, who]), torch.cat([self.index, index])
        self.low, self.high = torch.cat([self.low, low]), torch.cat([self.high, high])

    def prune(self) -> None:
        """Lower the limits to the K-th smallest `high`, and drop the pairs above them."""
        order, rank = self._ranked(self.high)
        last = order[rank == self.count - 1]
        self.limit[self.who[last]] = self.limit[self.who[last]].minimum(self.high[last])
        self._keep(self.low <= self.limit[self.who])

    def best(self) -> Tensor:
        """Return which pairs are among the first K of their client by `low`."""
        order, rank = self._ranked(self.low)
        chosen = torch.zeros(len(order), dtype=torch.bool)
        chosen[order[rank < self.count]] = True
        return chosen

    def keep_best(self) -> None:
        """Drop all but the first K of every client, where every key is known."""
        self.prune()
        self._keep(self.best())

    def ids_by_client(self) -> list[list[int]]:
        """Return the prompts of every client, best first."""
        order, _ = self._ranked(self.high)
        sizes = self.who.bincount(minlength=len(self.limit)).tolist()
        return [part.tolist() for part in self.index[order].split(sizes)]

    def _keep(self, mask: Tensor) -> None:
        self.who, self.index = self.who[mask], self.index[mask]
        self.low, self.high = self.low[mask], self.high[mask]

    def _ranked(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return the order of pairs by (client, key, prompt) and each one's place in its client."""
        order = key.argsort(stable=True)
        order = order[self.who[order].argsort(stable=True)]
        who = self.who[order]
        return order, torch.arange(len(who)) - torch.searchsorted(who, who)


class _Search:
    """One pass over the pool for P clients."""

    def __init__(
        self,
        pool: Mapping[int, Tensor],
        ids: list[int],
        clients: Sequence[int],
        count: int,
        farthest: bool,
    ) -> None:
        self.pool, self.ids, self.clients = pool, ids, clients
        self.sign = -1 if farthest else 1
        self.own = torch.stack([pool[client].flatten() for client in clients])
        self.place = torch.tensor([bisect_left(ids, client) for client in clients])
        self.rows = min(BLOCK_NUMBERS // self.own.shape[1], BLOCK_PAIRS // len(clients))
        self.rows = max(2, min(self.rows, len(ids)))
        self.crowd = CROWD * (count + 1) * len(clients)
        self.list = _Shortlist(len(clients), count)
        # Distances do not change, and small differences of large prompts survive the rounding
        self.centre = self.own.mean(dim=0, dtype=torch.float64).float()

    def run(self) -> dict[int, list[int]]:
        """Filter block by block, then refine; a filter that lets crowds pass is made finer."""
        dtype = filter_dtype(len(self.ids) * len(self.clients), self.own)
        buffer = torch.empty(self.rows, self.own.shape[1])
        points = self._rounded_clients(dtype)
        pruned = 0
        for start in range(0, len(self.ids), self.rows):
            stop = min(start + self.rows, len(self.ids))
            if points is None:
                self._add_all(start, stop)
            else:
                block = buffer[: stop - start]
                torch.stack([self.pool[i].flatten() for i in self.ids[start:stop]], out=block)
                self._filter(
                    points, _Rounded.of(block.sub_(self.centre), points.values.dtype), start
                )
            if len(self.list.who) > 2 * pruned:
                self.list.prune()
                pruned = len(self.list.who)
            if pruned > self.crowd:
                self._refine()
                pruned = len(self.list.who)
                if dtype == torch.bfloat16:
                    dtype = torch.float32
                    points = self._rounded_clients(dtype)
        self._refine()
        found = self.list.ids_by_client()
        return {
            client: [self.ids[i] for i in chosen]
            for client, chosen in zip(self.clients, found, strict=True)
        }

    def _rounded_clients(self, dtype: torch.dtype | None) -> _Rounded | None:
        return None if dtype is None else _Rounded.of(self.own - self.centre, dtype)

    def _add_all(self, start: int, stop: int) -> None:
        mask = self._others(torch.ones(len(self.clients), stop - start, dtype=torch.bool), start)
        who, index = mask.nonzero().unbind(1)
        unknown = torch.full((len(who),), torch.inf, dtype=torch.float64)
        self.list.add(who, index + start, -unknown, unknown)

    def _filter(self, points: _Rounded, block: _Rounded, start: int) -> None:
        """Add the pairs of a block whose lower bound is below the limit.

        An equal key would lose against the K pairs of lower ids that set the limit.
        """
        square, error = points.distances(block)
        edge = (self.sign * self.list.limit).clamp_(0, 16 * MAX_SQUARE).sqrt_().float()
        edge *= 1 + self.sign * EPSILON
        moved = points.moved.unsqueeze(1) + block.moved
        reach = moved.mul_(self.sign).add_(edge.unsqueeze(1)).clamp_(min=0).square_()
        # sign * square - error < sign * reach, so written that what overflowed stays
        mask = (square - reach).mul_(self.sign).sub_(error).ge_(0).logical_not()
        who, index = self._others(mask, start).nonzero().unbind(1)
        square, error = square[who, index].double(), error[who, index].double()
        apart = points.moved.double()[who] + block.moved.double()[index]
        near = (square - error).clamp_(min=0).sqrt_().sub_(apart).clamp_(min=0).square_()
        far = (square + error).clamp_(min=0).sqrt_().add_(apart).square_()
        near, far = near * (1 - EPSILON), far * (1 + EPSILON)
        low, high = (near, far) if self.sign == 1 else (-far, -near)
        low = low.nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)
        high = high.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.inf)
        self.list.add(who, index + start, low, high)

    def _others(self, mask: Tensor, start: int) -> Tensor:
        """Return a block's mask (P, R) without the clients' own prompts."""
        inside = (self.place >= start) & (self.place < start + mask.shape[1])
        who = inside.nonzero().squeeze(1)
        mask[who, self.place[who] - start] = False
        return mask

    def _refine(self) -> None:
        """Leave the K nearest of every client so far: the likeliest first, to spare the others."""
        self._measure(self.list.best())
        self.list.prune()
        self._measure(torch.ones(len(self.list.who), dtype=torch.bool))
        self.list.keep_best()

    def _measure(self, mask: Tensor) -> None:
        """Replace the bounds of pairs by their keys, in float64."""
        pairs = self.list
        todo = (mask & (pairs.low < pairs.high)).nonzero().squeeze(1)
        todo = todo[pairs.who[todo].argsort(stable=True)]
        sizes = pairs.who[todo].bincount(minlength=len(self.clients)).tolist()
        for own, of_client in zip(self.own, todo.split(sizes), strict=True):
            for part in of_client.split(self.rows):
                prompts = [self.pool[self.ids[i]].flatten() for i in pairs.index[part].tolist()]
                if prompts:
                    differences = torch.stack(prompts).double().sub_(own.double())
                    pairs.low[part] = pairs.high[part] = self.sign * differences.square_().sum(1)
