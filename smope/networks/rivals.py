"""Scores after a closer look: pairs that were named wrongly, to learn from, and what the look takes off.

The detector names a mesh by one vector of a query. What reads the region of a pair sees far more of it, and
can tell that a thing of the same colour is another thing: it lowers the score, never raises it, so that what
the detector leaves out stays out. It learns from the matched pairs and from the best-scored wrong ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from smope.geometry.boxes import cxcywh_to_xyxy, paired_iou
from smope.networks.deformable import inverse_sigmoid

_NEAR = 0.3  # IoU with an object of the name from which a pair is no rival: it may be meant for that


@dataclass(frozen=True, eq=False)
class Rivals:
    """The best-scored pairs of the last decoder layer whose mesh is not where their box is."""

    logit: Tensor  # [B, R] of the detector; -inf where an image has fewer
    score_shift: Tensor  # [B, R] <= 0


def choose_rivals(
    logits: Tensor, boxes: Tensor, labels: Tensor, truth: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [B, Q, M] and boxes [B, Q, 4] of queries, labels [B, N] (-1: empty) and truth [B, N, 4] of the
    objects -> query, label, logit [B, R] each, best first"""
    corners, true = cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(truth)
    iou = paired_iou(corners[:, :, None], true[:, None])[0]  # [B, Q, N]
    near = (iou > _NEAR) & (labels >= 0)[:, None]
    meshes = torch.arange(logits.shape[-1], device=logits.device)
    own = labels[:, :, None] == meshes  # [B, N, M]
    right = (near.to(logits.dtype) @ own.to(logits.dtype)) > 0  # [B, Q, M]
    wrong = logits.detach().float().masked_fill(right, -torch.inf).flatten(1)
    logit, best = wrong.topk(min(count, wrong.shape[1]), dim=1)
    return best // logits.shape[-1], best % logits.shape[-1], logit


def best_first(scores: Tensor) -> Tensor:
    """[B, P] -> [B, P] where the best of each image stands, the second, ..."""
    return scores.topk(scores.shape[1], dim=1).indices


def shifted_scores(scores: Tensor, shift: Tensor) -> Tensor:
    """[...] in 0..1, and what is added to their logits"""
    return (inverse_sigmoid(scores) + shift).sigmoid()
