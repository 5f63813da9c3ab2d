"""Box arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], -1)


def paired_iou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """[..., 4] xyxy each, broadcast -> IoU [...] and union area [...]"""
    low = torch.maximum(a[..., :2], b[..., :2])
    high = torch.minimum(a[..., 2:], b[..., 2:])
    common = (high - low).clamp(min=0).prod(-1)
    union = (
        (a[..., 2:] - a[..., :2]).clamp(min=0).prod(-1)
        + (b[..., 2:] - b[..., :2]).clamp(min=0).prod(-1)
        - common
    )
    return common / union.clamp(min=1e-9), union


def share_inside(boxes: Tensor, areas: Tensor) -> Tensor:
    """[..., 4] xyxy each, broadcast -> how much of each box lies within the area, 0..1"""
    low = torch.maximum(boxes[..., :2], areas[..., :2])
    high = torch.minimum(boxes[..., 2:], areas[..., 2:])
    common = (high - low).clamp(min=0).prod(-1)
    return common / (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1).clamp(min=1e-9)


def paired_giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU (Rezatofighi et al. 2019) of [..., 4] xyxy boxes, broadcast."""
    iou, union = paired_iou(a, b)
    hull = (
        (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    )
    return iou - (hull - union) / hull.clamp(min=1e-9)
