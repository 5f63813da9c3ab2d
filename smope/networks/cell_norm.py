"""GroupNorm (Wu and He 2018) of the cells of a feature map, stored one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from smope.networks.recorded import recorded_whole, whole_steps


def normed_cells(cells: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """cells [B, S, C], weight and bias [C] -> [B, S, C] in the cells' type; statistics in float32 over all
    cells of an image and the channels of a group"""
    if recorded_whole():
        return normed_cells_whole(cells, weight, bias, groups, eps)
    grouped = cells.unflatten(-1, (groups, -1)).float()  # [B, S, G, C / G]
    variance, mean = torch.var_mean(grouped, (1, 3), correction=0, keepdim=True)  # [B, 1, G, 1]
    scale = (variance + eps).rsqrt() * weight.unflatten(0, (groups, -1))
    shift = bias.unflatten(0, (groups, -1)) - mean * scale
    return (grouped * scale + shift).flatten(2).to(cells.dtype)


@torch.library.custom_op("smope::normed_cells", mutates_args=())
def normed_cells_whole(cells: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    with whole_steps(False):
        return normed_cells(cells, weight, bias, groups, eps)


@normed_cells_whole.register_fake
def _(cells: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    return torch.empty_like(cells, memory_format=torch.contiguous_format)
