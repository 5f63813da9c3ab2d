"""Assignment problems on the GPU, one a program: matching then never waits for the host.

Annotations are evaluated here: Triton's interpreter of torch 2.5 does not read their text.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _assign(table, chosen, queries, slots, Q: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton has no types of pointers
    """Shortest augmenting paths (Crouse 2016, "On implementing 2D rectangular assignment algorithms")."""
    problem = tl.program_id(0).to(tl.int64)
    costs = table + problem * queries * slots
    column = tl.arange(0, Q)
    row = tl.arange(0, N)
    exists = column < queries
    row_of = tl.full([Q], -1, tl.int32)  # of each column
    column_of = tl.full([N], -1, tl.int32)
    u = tl.zeros([N], tl.float32)
    v = tl.zeros([Q], tl.float32)
    for new in range(slots):
        shortest = tl.full([Q], float("inf"), tl.float32)
        path = tl.full([Q], -1, tl.int32)
        done = column < 0
        reached = row < 0
        low = 0.0
        at = new
        sink = -1
        while sink < 0:
            reached = reached | (row == at)
            here = tl.sum(tl.where(row == at, u, 0.0), 0)
            cost = tl.load(costs + column * slots + at, mask=exists, other=float("inf"))
            way = low + cost - here - v
            better = (way < shortest) & (done == 0)
            shortest = tl.where(better, way, shortest)
            path = tl.where(better, at, path)
            open_ = tl.where(done, float("inf"), shortest)
            low = tl.min(open_, 0)
            best = tl.argmin(open_, 0)
            holder = tl.sum(tl.where(column == best, row_of, 0), 0)
            sink = tl.where(holder < 0, best, -1)
            at = tl.where(holder < 0, at, holder)
            done = done | (column == best)
        for other in range(slots):
            mine = tl.sum(tl.where(row == other, column_of, 0), 0)
            length = tl.sum(tl.where(column == mine, shortest, 0.0), 0)
            change = tl.where(other == new, low, low - length)
            u = tl.where((row == other) & reached, u + change, u)
        v = tl.where(done, v - (low - shortest), v)
        back = sink
        at = -1
        while at != new:
            at = tl.sum(tl.where(column == back, path, 0), 0)
            row_of = tl.where(column == back, at, row_of)
            before = tl.sum(tl.where(row == at, column_of, 0), 0)
            column_of = tl.where(row == at, back, column_of)
            back = before
    tl.store(chosen + problem * slots + row, column_of.to(tl.int64), mask=row < slots)


def assign_on_device(table: Tensor) -> Tensor:
    """[L, B, Q, N] finite costs on the GPU, N at most Q -> [L, B, N] each slot's query in the cheapest
    assignment"""
    layers, images, queries, slots = table.shape
    table = table.float().contiguous()
    chosen = torch.empty(layers, images, slots, dtype=torch.int64, device=table.device)
    Q, N = triton.next_power_of_2(queries), triton.next_power_of_2(slots)
    _assign[(layers * images,)](table, chosen, queries, slots, Q, N, num_warps=1)
    return chosen
