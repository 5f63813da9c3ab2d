"""Deformable DETR's encoder and decoder layers (Zhu et al. 2021), shared by every network of this library.

Names of submodules are those of the paper's code, so that its checkpoints map one to one.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smope.networks.cell_norm import normed_cells
from smope.networks.position import Shapes
from smope.networks.precision import autocast_type, without_autocast
from smope.networks.self_attention import MultiheadAttention
from smope.ops import ms_deform_attn
from smope.ops.cpu_forms import linear, takes_cpu_form


class DeformableAttention(nn.Module):
    """Each query reads a few points around its reference, at every level (eq. 3 of the paper)."""

    def __init__(self, width: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(width, heads * levels * points * 2)
        self.attention_weights = nn.Linear(width, heads * levels * points)
        self.value_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)
        self._reset()

    def _reset(self) -> None:
        # The heads start out looking in different directions, their points at growing distances.
        angles = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions = directions / directions.abs().max(-1, keepdim=True).values
        steps = torch.arange(1, self.points + 1, dtype=torch.float32)
        bias = directions[:, None, None, :] * steps[None, None, :, None]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(bias.expand(-1, self.levels, -1, -1).reshape(-1))
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        queries: Tensor,
        reference: Tensor,
        memory: Tensor,
        shapes: Shapes,
        padding: Tensor | None = None,
    ) -> Tensor:
        """queries [B, Q, C], reference [B, Q, L, 2 or 4] in 0..1, memory [B, S, C], padding [B, S] bool ->
        [B, Q, C]"""
        batch, count, _ = queries.shape
        points = (self.heads, self.levels, self.points)
        offsets = linear(self.sampling_offsets, queries).view(batch, count, *points, 2)
        logits = linear(self.attention_weights, queries).view(batch, count, *points)
        if padding is None and count * self.heads < memory.shape[1] and takes_cpu_form(memory):
            return self.output_proj(self._project_what_is_read(memory, shapes, reference, offsets, logits))
        value = linear(self.value_proj, memory)
        if padding is not None:
            value = value.masked_fill(padding[..., None], 0.0)
        value = value.unflatten(-1, (self.heads, -1))  # [B, S, H, D]
        attended = ms_deform_attn(value, shapes, reference, offsets, logits)
        return linear(self.output_proj, attended)

    def _project_what_is_read(
        self, memory: Tensor, shapes: Shapes, reference: Tensor, offsets: Tensor, logits: Tensor
    ) -> Tensor:
        """Attention of few queries: each head reads the cells as they are, and `value_proj` comes after.

        Both are linear, so that the order does not matter; the bias counts by the share that was read
        inside the image.
        """
        reference = reference.repeat_interleave(self.heads, 1)  # a query for each query and head
        offsets, logits = (t.flatten(1, 2)[:, :, None] for t in (offsets, logits))
        read, inside = (
            ms_deform_attn(cells[:, :, None], shapes, reference, offsets, logits)
            for cells in (memory, torch.ones_like(memory[..., :1]))
        )
        read, inside = (
            t.unflatten(1, (-1, self.heads)) for t in (read, inside)
        )  # [B, Q, H, C], [B, Q, H, 1]
        weight = self.value_proj.weight.unflatten(0, (self.heads, -1))
        bias = self.value_proj.bias.unflatten(0, (self.heads, -1))
        return (torch.einsum("bqhc,hdc->bqhd", read, weight) + inside * bias).flatten(2)


def dropout_layer(share: float) -> nn.Module:
    """Nothing at all where the share is 0, so that networks without dropout keep their graph."""
    return nn.Dropout(share) if share else nn.Identity()


class NarrowLayerNorm(nn.LayerNorm):
    """LayerNorm that reads and writes autocast's type; mean and variance are in float32 all the same.

    Autocast itself would widen its input and its output to float32: for the thousands of cells of an image
    that is most of the traffic of a layer, and the next product rounds them back.
    """

    def forward(self, x: Tensor) -> Tensor:
        kind = autocast_type(x)
        with without_autocast(x):
            weight, bias = self.weight.to(kind), self.bias.to(kind)
            return F.layer_norm(x.to(kind), self.normalized_shape, weight, bias, self.eps)


class CellProjection(nn.Sequential):
    """1x1 convolution and GroupNorm of a feature map, given as cells: [B, C, h, w] -> [B, h * w, width].

    Keys and values are those of Sequential(Conv2d, GroupNorm). Those work on planes, and a map that is stored
    channels last would be turned over twice.
    """

    def __init__(self, inputs: int, width: int, groups: int = 32) -> None:
        super().__init__(nn.Conv2d(inputs, width, 1), nn.GroupNorm(groups, width))

    def forward(self, x: Tensor) -> Tensor:
        conv, norm = self
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.GroupNorm)
        cells = x.permute(0, 2, 3, 1).flatten(1, 2)  # [B, h w, C], a view where x is stored channels last
        cells = F.linear(cells, conv.weight.flatten(1), conv.bias)
        return normed_cells(cells, norm.weight, norm.bias, norm.num_groups, norm.eps)


class FeedForward(nn.Module):
    """linear1, ReLU, linear2, shortcut, norm."""

    def __init__(
        self, width: int, hidden: int, dropout: float = 0.0, norm: type[nn.LayerNorm] = nn.LayerNorm
    ) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.norm = norm(width)
        self.dropout = dropout_layer(dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(linear(self.linear1, x, relu=True))
        return self.norm(x + self.dropout(linear(self.linear2, hidden)))


class EncoderLayer(nn.Module):
    """Deformable self-attention of a feature pyramid."""

    def __init__(
        self, width: int, heads: int, levels: int, points: int, hidden: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.self_attn = DeformableAttention(width, heads, levels, points)
        self.norm1 = NarrowLayerNorm(width)
        self.feed_forward = FeedForward(width, hidden, dropout, NarrowLayerNorm)
        self.dropout = dropout_layer(dropout)

    def forward(
        self,
        memory: Tensor,
        positions: Tensor,
        reference: Tensor,
        shapes: Shapes,
        padding: Tensor | None = None,
    ) -> Tensor:
        """memory [B, S, C], positions [B or 1, S, C], reference [B, S, L, 2] -> [B, S, C]"""
        # Under autocast memory stays in its type from layer to layer: this is where the bytes are.
        memory = memory.to(autocast_type(memory))
        placed = memory + positions.to(memory.dtype)
        attended = self.self_attn(placed, reference, memory, shapes, padding)
        return self.feed_forward(self.norm1(memory + self.dropout(attended)))


class DecoderLayer(nn.Module):
    """Self-attention among queries, then deformable attention to the image."""

    def __init__(
        self, width: int, heads: int, levels: int, points: int, hidden: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.self_attn = MultiheadAttention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.cross_attn = DeformableAttention(width, heads, levels, points)
        self.norm1 = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, hidden, dropout)
        self.dropout = dropout_layer(dropout)

    def forward(
        self,
        queries: Tensor,
        positions: Tensor,
        reference: Tensor,
        memory: Tensor,
        shapes: Shapes,
        blocked: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """queries and positions [B, Q, C], reference [B, Q, L, 2 or 4], blocked [Q, Q] bool (True: may not
        look)"""
        placed = queries + positions
        attended = self.self_attn(placed, placed, queries, blocked)
        queries = self.norm2(queries + self.dropout(attended))
        attended = self.cross_attn(queries + positions, reference, memory, shapes, padding)
        return self.feed_forward(self.norm1(queries + self.dropout(attended)))


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, inputs: int, hidden: int, outputs: int, layers: int) -> None:
        super().__init__()
        sizes = [inputs] + [hidden] * (layers - 1) + [outputs]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x), inplace=True)
        return self.layers[-1](x)


def zero_last(mlp: MLP) -> MLP:
    """Start an MLP's output at 0, so that a refinement begins as no change."""
    last = mlp.layers[-1]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return mlp


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    x = x.clamp(0.0, 1.0)
    return (x.clamp(min=eps) / (1.0 - x).clamp(min=eps)).log()
