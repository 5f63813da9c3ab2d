"""Small linear systems in plain tensor operations.

`torch.linalg` has no counterpart in ONNX; written out, the same few additions and multiplications run in
every runtime, wait for no device, and can be fused by a compiler.
"""

from __future__ import annotations

import torch
from torch import Tensor


def solve_spd(normal: Tensor, right: Tensor) -> Tensor:
    """The x of `normal` x = `right`, by Gauss-Jordan elimination.

    normal [..., n, n] symmetric positive definite, right [..., n] -> [..., n]. Such a matrix needs no pivots
    (Higham, Accuracy and Stability of Numerical Algorithms, 14.4). Differentiable in both.
    """
    size = normal.shape[-1]
    table = torch.cat([normal, right[..., None]], -1)  # [..., n, n + 1]
    for done in range(size):
        # The first row solves for its unknown, which leaves the others; the row then goes to the end, so that
        # after n turns all stand in their old order.
        first, others = table.split([1, size - 1], -2)
        pivot, first = first.split([1, size - done], -1)
        column, others = others.split([1, size - done], -1)
        first = first / pivot
        table = torch.cat([others - column * first, first], -2)  # [..., n, n - done]
    return table[..., 0]


def invert_intrinsics(K: Tensor) -> Tensor:
    """K [..., 3, 3] = [[fx, s, cx], [0, fy, cy], [0, 0, 1]] -> its inverse [..., 3, 3]"""
    fx, skew, cx = K[..., 0, :].unbind(-1)
    fy, cy = K[..., 1, 1], K[..., 1, 2]
    zero, one = torch.zeros_like(fx), torch.ones_like(fx)
    across = torch.stack([1 / fx, -skew / (fx * fy), (skew * cy / fy - cx) / fx], -1)
    down = torch.stack([zero, 1 / fy, -cy / fy], -1)
    return torch.stack([across, down, torch.stack([zero, zero, one], -1)], -2)
