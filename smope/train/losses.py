"""Losses as small functions: boxes and classes (L_D), meshes (L_M), poses (L_P)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from smope.geometry.boxes import cxcywh_to_xyxy, paired_giou


def varifocal(logits: Tensor, quality: Tensor, alpha: float = 0.75, gamma: float = 2.0) -> Tensor:
    """Elementwise varifocal loss (Zhang et al. 2021, eq. 2): positives carry their quality in 0..1, the
    rest 0."""
    logits, quality = logits.float(), quality.float()
    weight = torch.where(quality > 0, quality, alpha * logits.detach().sigmoid() ** gamma)
    return weight * F.binary_cross_entropy_with_logits(logits, quality, reduction="none")


def box_loss(boxes: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """[..., 4] cxcywh each -> L1 [...] and 1 - GIoU [...]"""
    l1 = (boxes - truth).abs().sum(-1)
    return l1, 1 - paired_giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(truth))


def model_point_distance(rotation: Tensor, truth: Tensor, points: Tensor) -> Tensor:
    """Mean distance of model points under two rotations: [..., 3, 3] twice, [..., A, 3] -> [...]"""
    return (points @ (rotation - truth).transpose(-1, -2)).norm(dim=-1).mean(-1)


def chamfer(a: Tensor, b: Tensor) -> Tensor:
    """Symmetric mean nearest distance of point sets [M, P, 3] and [M, Q, 3] -> [M]"""
    distance = torch.cdist(a.float(), b.float())
    return (distance.amin(2).mean(1) + distance.amin(1).mean(1)) / 2


def laplace_nll(log_sigma: Tensor, error: Tensor) -> Tensor:
    """Negative log-likelihood of an error under a Laplace law of expected size sigma; the error carries no
    gradient."""
    return error.detach() * (-log_sigma).exp() + log_sigma


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Weighted mean of `values` under `mask` of the same shape; 0 where nothing is selected."""
    mask = mask.to(values.dtype)
    return (values * mask).sum() / mask.sum().clamp(min=1.0)
