"""Denoising queries: noised copies of the true boxes, in training only (Li et al. 2022, DN-DETR)."""

from __future__ import annotations

import torch
from torch import Tensor


def noised_boxes(labels: Tensor, boxes: Tensor, groups: int, noise: float = 0.4) -> Tensor:
    """labels [B, N], boxes [B, N, 4] cxcywh in 0..1 -> [B, groups * N, 4]; empty slots get a box in the
    middle

    Centres move by up to noise / 2 of the box, sides grow or shrink by up to that share of themselves.
    """
    middle = torch.cat([torch.full_like(boxes[..., :2], 0.5), torch.full_like(boxes[..., 2:], 0.1)], -1)
    boxes = torch.where((labels >= 0)[..., None], boxes, middle)
    boxes = boxes.repeat(1, groups, 1)
    jitter = torch.rand_like(boxes) * 2 - 1
    centres = boxes[..., :2] + jitter[..., :2] * boxes[..., 2:] * (noise / 2)
    sizes = boxes[..., 2:] * (1 + jitter[..., 2:] * noise)
    return torch.cat([centres, sizes], -1).clamp(1e-3, 1 - 1e-3)


def attention_mask(groups: int, slots: int, queries: int, device: torch.device) -> Tensor:
    """[D + Q, D + Q] bool, True where looking is forbidden: no group sees another, and no real query sees a
    group."""
    noised = groups * slots
    group = torch.arange(noised, device=device) // slots
    blocked = torch.zeros(noised + queries, noised + queries, dtype=torch.bool, device=device)
    blocked[:noised, :noised] = group[:, None] != group[None, :]
    blocked[noised:, :noised] = True
    return blocked
