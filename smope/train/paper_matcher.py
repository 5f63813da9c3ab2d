"""Hungarian matching of the authors' loss: one decoder layer, each image by itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from smope.geometry.boxes import cxcywh_to_xyxy, paired_giou
from smope.train.matcher import MatchCosts, _focal_cost

Match = tuple[Tensor, Tensor]  # queries [N] rising, and the objects [N] they belong to


def matching_cost(logits: Tensor, boxes: Tensor, labels: Tensor, truth: Tensor, costs: MatchCosts) -> Tensor:
    """logits [Q, K], boxes [Q, 4] cxcywh, labels [N], truth [N, 4] -> [Q, N].

    The class counts by the focal cost of a sigmoid, although loss and score use a softmax.
    """
    l1 = (boxes[:, None] - truth[None]).abs().sum(-1)
    giou = paired_giou(cxcywh_to_xyxy(boxes)[:, None], cxcywh_to_xyxy(truth)[None])
    return costs.l1 * l1 + costs.label * _focal_cost(logits)[:, labels] - costs.giou * giou


@torch.no_grad()
def match_images(
    logits: Tensor, boxes: Tensor, labels: Sequence[Tensor], truths: Sequence[Tensor], costs: MatchCosts
) -> list[Match]:
    """logits [B, Q, K], boxes [B, Q, 4], and the objects of each image"""
    matches = []
    for image, (label, truth) in enumerate(zip(labels, truths, strict=True)):
        cost = matching_cost(logits[image].float(), boxes[image].float(), label, truth, costs)
        cost = cost.nan_to_num(1e4, 1e4, 1e4)
        query, target = linear_sum_assignment(cost.cpu().numpy())
        matches.append((torch.as_tensor(query).to(label.device), torch.as_tensor(target).to(label.device)))
    return matches
