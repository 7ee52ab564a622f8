"""The K nearest prompts of many clients, exactly: bound every distance, measure those that matter.

A matrix product bounds the squared distances of all clients to a block of the pool. Pairs whose
lower bound exceeds the client's K-th best distance so far are dropped. The others are measured, as
squared differences summed in float64 on the CPU, and ranked by that alone.

The bound, for prompts of D numbers: x and y are two prompts less a centre, rounded to a dtype of
unit roundoff u and smallest normal number t; S is x^2 + y^2 as computed. If D u <= 1/16, then
|x^2 + y^2 - 2 x.y - measured| <= (4 D + 32) u S + 16 D t, because rounding shifts
    x^2 + y^2 and 2 x.y by 2.3 D u S: each by D u / (1 - D u) of its sum of magnitudes, whatever
        the order of summing (Higham 2002, section 3.1), and 2 sum |x_i y_i| <= x^2 + y^2;
    the measured sum by 1.7 D u S (where the bounds are float64 too, both are 2 D u S);
    x and y by 5 u S, additions by 8, the K-th best by 3, here doubled; underflow by 16 D t.
"""

from bisect import insort
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Pool = Mapping[int, Tensor]
MAX_CLIENTS, MAX_OWN = 4096, 2**25  # clients of one pass over the pool, numbers in their prompts
BLOCK_NUMBERS, BLOCK_PAIRS = 2**21, 2**20  # a block and its distances stay in the cache
CUDA_PRODUCTS = 2**32  # a smaller search is over before CUDA has started


def nearest(
    pool: Pool, clients: Sequence[int], count: int, *, farthest: bool = False, device: str = "auto"
) -> dict[int, list[int]]:
    """Return for every client the ids of the `count` others with the nearest prompts, in order.

    By l2 distance in float64, ties by the lower id; `farthest`: the greatest distance first. All
    prompts have one shape and dtype and are finite. `device` computes the bounds; "auto": CUDA for
    a large search where there is one. Raises KeyError where a client has no prompt.
    """
    if missing := set(clients) - pool.keys():
        raise KeyError(min(missing))
    ids, count = sorted(pool), min(count, len(pool) - 1)
    if not clients or count < 1:
        return {client: [] for client in clients}
    size = pool[ids[0]].numel()
    if device == "auto":
        large = len(ids) * len(clients) * size > CUDA_PRODUCTS
        device = "cuda" if large and torch.cuda.is_available() else "cpu"
    width = max(1, min(MAX_CLIENTS, MAX_OWN // size))
    sign, found = -1 if farthest else 1, dict[int, list[int]]()
    for start in range(0, len(clients), width):
        found |= _search(pool, ids, clients[start : start + width], count, sign, device)
    return found


def _search(
    pool: Pool, ids: list[int], clients: Sequence[int], count: int, sign: int, device: str
) -> dict[int, list[int]]:
    """Return the others with the least sign * distance, from one pass over the pool."""
    own = torch.stack([pool[client].flatten() for client in clients])
    centre = own.to(device, _dtype(own, device)).median(dim=0).values  # a huge prompt moves a mean
    x, x_low, x_error = _bounded(own, centre, sign)
    best: list[list[tuple[float, int]]] = [[] for _ in clients]
    rows = max(count + 1, min(BLOCK_NUMBERS // own.shape[1], BLOCK_PAIRS // len(own)))
    for start in range(0, len(ids), rows):
        some = ids[start : start + rows]
        block = torch.stack([pool[i].flatten() for i in some])
        y, y_low, y_error = _bounded(block, centre, sign)
        low = (x @ y.t()).mul_(-2 * sign).add_(x_low.unsqueeze(1)).add_(y_low)
        if start == 0:  # K others have upper bounds up to here
            high = low + 2 * (x_error.unsqueeze(1) + y_error)
            limit = high.topk(count + 1, largest=False).values[:, -1:]
        pairs = (low > limit).logical_not_().nonzero().cpu()
        for part in pairs.split(max(1, BLOCK_NUMBERS // 16 // own.shape[1])):
            theirs, mine = block.index_select(0, part[:, 1]), own.index_select(0, part[:, 0])
            # NumPy sums a row alike in any company, so that ties stay ties; PyTorch does not
            measured = sign * theirs.double().sub_(mine).square_().numpy().sum(axis=1)
            for (who, near), key in zip(part.tolist(), measured.tolist(), strict=True):
                if some[near] != clients[who]:
                    insort(best[who], (key, some[near]))
                    del best[who][count:]
        limit = low.new_tensor([ranked[-1][:1] for ranked in best])
    return {client: [i for _, i in ranked] for client, ranked in zip(clients, best, strict=True)}


def _bounded(prompts: Tensor, centre: Tensor, sign: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return x (n, D), and each one's share of the lower bounds and of the error, both (n,)."""
    x, dtype, size = prompts.to(centre) - centre, torch.finfo(centre.dtype), len(centre)
    square = x.square().sum(dim=1)
    square[square > dtype.max / 8] = torch.inf  # its bounds are infinite or NaN: no drop
    error = (2 * size + 16) * dtype.eps * square + 8 * size * dtype.tiny
    return x, sign * square - error, error


def _dtype(prompts: Tensor, device: str) -> torch.dtype:
    """Return float32 if D u is small, and no global setting makes its products TF32 or bfloat16."""
    try:
        full = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set by one of PyTorch's newer switches
        full = False
    full = full and not torch.is_autocast_enabled("cpu") and device == "cpu"
    small = prompts.dtype != torch.float64 and prompts.shape[1] <= 2**20
    return torch.float32 if full and small else torch.float64
