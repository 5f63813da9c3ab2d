"""Deformable attention on a CPU by PyTorch's operators, for results alone: a query's samples as one bag.

`grid_sample` writes all samples down before they are weighed; `embedding_bag` weighs and adds them as it
reads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(
    value: Tensor,
    spatial_shapes: tuple[tuple[int, int], ...],
    reference: Tensor,
    offsets: Tensor,
    logits: Tensor,
) -> Tensor:
    """Arguments as of `ms_deform_attn`, in float32 and not empty. Returns [B, Q, H*D]."""
    batch, _, heads, channels = value.shape
    queries, levels, points = logits.shape[1], *logits.shape[3:]
    sizes = offsets.new_tensor([(w, h) for h, w in spatial_shapes])  # [L, 2]
    at = (reference[..., :2] * sizes - 0.5)[:, :, None, :, None]  # [B, Q, 1, L, 1, 2] cells
    step = reference[..., 2:] * sizes * (0.5 / points) if reference.shape[-1] == 4 else None
    at = at + offsets if step is None else torch.addcmul(at, offsets, step[:, :, None, :, None])
    # Zeros stand around each level, a row before it and two behind; what lies further out is moved there.
    at = torch.minimum(at.nan_to_num(-1.0).clamp(min=-1.0), sizes[:, None])
    low = at.floor()
    right, down = (at - low).unbind(-1)  # [B, Q, H, L, P] 0..1 of the way to the next cell

    split = value.flatten(2).split([h * w for h, w in spatial_shapes], 1)
    framed = [
        F.pad(cells.unflatten(1, shape), (0, 0, 1, 2, 1, 2)).flatten(1, 2)
        for cells, shape in zip(split, spatial_shapes, strict=True)
    ]
    table = torch.cat(framed, 1).view(-1, channels)  # a row for each image, cell and head, in this order
    starts, wide = [0], [w + 3 for _, w in spatial_shapes]
    for cells in framed:
        starts.append(starts[-1] + cells.shape[1])
    column, row = low.int().unbind(-1)
    first = torch.tensor([s + w + 1 for s, w in zip(starts[:-1], wide, strict=True)], dtype=torch.int32)
    cell = row * torch.tensor(wide, dtype=torch.int32)[:, None] + column + first[:, None]  # top left
    images = torch.arange(batch, dtype=torch.int32) * (starts[-1] * heads)
    owner = images[:, None] + torch.arange(heads, dtype=torch.int32)  # [B, H]
    rows = cell * heads + owner[:, None, :, None, None]
    around = [[(w * i + j) * heads for w in wide] for i in (0, 1) for j in (0, 1)]
    rows = rows[:, :, :, None] + torch.tensor(around, dtype=torch.int32)[:, :, None]  # [B, Q, H, 4, L, P]

    weights = logits.flatten(3).softmax(-1).view(logits.shape)
    lower = weights * down
    upper = weights - lower
    below, above = lower * right, upper * right
    shares = torch.stack([upper - above, above, lower - below, below], 3)
    bags = (batch * queries * heads, 4 * levels * points)
    read = F.embedding_bag(rows.reshape(bags), table, per_sample_weights=shares.view(bags), mode="sum")
    return read.view(batch, queries, heads * channels)
