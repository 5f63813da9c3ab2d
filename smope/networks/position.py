"""Sine position embedding and reference grids of a feature pyramid."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Shapes = tuple[tuple[int, int], ...]  # (height, width) of each level


def sine_embedding(coordinates: Tensor, width: int, temperature: float = 10000.0) -> Tensor:
    """[..., D] coordinates in 0..1 -> [..., D * width]: sines and cosines, interleaved (Carion et al. 2020,
    DETR)."""
    exponent = torch.arange(width, device=coordinates.device, dtype=torch.float32)
    divisor = temperature ** (2 * torch.div(exponent, 2, rounding_mode="floor") / width)
    angles = coordinates[..., None].float() * (2 * math.pi) / divisor  # [..., D, width]
    waves = torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], dim=-1)  # [..., D, width / 2, 2]
    return waves.flatten(-3)


def box_embedding(boxes: Tensor, width: int, temperature: float = 10000.0) -> Tensor:
    """[..., D] coordinates in 0..1 -> [..., D * width]: `sine_embedding` up to rounding, number by number.

    A cosine is the sine a quarter turn later.
    """
    index = torch.arange(width, device=boxes.device, dtype=torch.float32)
    odd = index % 2
    frequency = (2 * math.pi) * temperature ** ((odd - index) / width)
    return (boxes[..., None].float() * frequency + odd * (math.pi / 2)).sin().flatten(-2)


def cell_centres(shapes: Shapes, device: torch.device) -> Tensor:
    """[S, 2] centres (x, y) of the cells of all levels in turn, in 0..1."""
    grids = []
    for height, width in shapes:
        y = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) / height
        x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) / width
        grids.append(torch.stack([x[None].expand(height, width), y[:, None].expand(height, width)], -1))
    return torch.cat([grid.flatten(0, 1) for grid in grids])


def pyramid_positions(shapes: Shapes, width: int, device: torch.device) -> Tensor:
    """[S, width] sine embedding of the cells, y first as in DETR."""
    return sine_embedding(cell_centres(shapes, device).flip(-1), width // 2)


def unpadded_centres(padding: Tensor) -> Tensor:
    """[B, h, w] bool, True on padding -> [B, h * w, 2] centres (x, y) in 0..1 of the part that is image.

    DETR's rule to the bit, its 1e-6 included: cells in columns (rows) without any image get a huge value,
    whose sine depends on every rounding.
    """
    image = ~padding
    y = image.cumsum(1, dtype=torch.float32)
    x = image.cumsum(2, dtype=torch.float32)
    y = (y - 0.5) / (y[:, -1:, :] + 1e-6)
    x = (x - 0.5) / (x[:, :, -1:] + 1e-6)
    return torch.stack([x, y], -1).flatten(1, 2)


def valid_ratios(padding: Tensor) -> Tensor:
    """[B, h, w] bool, True on padding -> [B, 2] share of the width and of the height that is image."""
    image = (~padding).float()
    return torch.stack([image[:, 0, :].mean(1), image[:, :, 0].mean(1)], -1)
