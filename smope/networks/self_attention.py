"""Multi-head attention in few kernels: batch first all the way, so that nothing is turned over or copied."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MultiheadAttention(nn.Module):
    """nn.MultiheadAttention(batch_first=True) without weights among its results.

    Parameters, their names and how they start are those of PyTorch's. That one turns batches to
    sequence-first and back, and projects queries, keys and values apart unless all three are one tensor.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))  # of queries, keys, values
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, blocked: Tensor | None = None) -> Tensor:
        """query [B, Q, C], key and value [B, K, C], blocked [Q, K] bool (True: may not look) -> [B, Q, C]"""
        q, k, v = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in self._project(query, key, value)
        )
        allowed = None if blocked is None else ~blocked
        dropout = self.dropout if self.training else 0.0
        read = F.scaled_dot_product_attention(q, k, v, allowed, dropout)  # [B, H, Q, D]
        return self.out_proj(read.transpose(1, 2).flatten(2))

    def _project(self, *given: Tensor) -> list[Tensor]:
        """Queries, keys and values: one product for neighbours that are made from the same tensor"""
        weight, bias = self.in_proj_weight, self.in_proj_bias
        starts = [0, *(i for i in (1, 2) if given[i] is not given[i - 1]), 3]
        if (
            len(starts) == 2
        ):  # the parameters themselves, which autocast rounds once where a layer is repeated
            return list(F.linear(given[0], weight, bias).chunk(3, -1))
        projected: list[Tensor] = []
        for start, stop in pairwise(starts):
            rows = slice(start * weight.shape[1], stop * weight.shape[1])
            projected += F.linear(given[start], weight[rows], bias[rows]).chunk(stop - start, -1)
        return projected
