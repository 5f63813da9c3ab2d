"""Hungarian matching of queries to objects (Carion et al. 2020, DETR, eq. 1; classification cost as in
Deformable DETR)."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from smope.geometry.boxes import cxcywh_to_xyxy, paired_giou
from smope.networks.outputs import Detections
from smope.networks.smope_s import Targets


@dataclass(frozen=True)
class MatchCosts:
    label: float = 2.0
    l1: float = 5.0
    giou: float = 2.0


class HungarianMatcher:
    """All layers and images in one cost tensor, and one assignment problem each."""

    def __init__(self, costs: MatchCosts | None = None) -> None:
        self.costs = costs or MatchCosts()

    @torch.no_grad()
    def __call__(self, detections: Detections, targets: Targets) -> Tensor:
        """-> [L + 1, B, N] the query of each object slot, counted behind the denoising ones, -1 for empty
        slots; the last row is the encoder's proposals."""
        match = assign(self.cost_table(detections, targets))
        return match.masked_fill((targets.labels < 0)[None], -1)

    def cost_table(self, detections: Detections, targets: Targets) -> Tensor:
        """[L + 1, B, Q, N] float32"""
        skip = detections.denoising
        labels = targets.labels.clamp(min=0)
        layers, _, queries, _ = detections.logits[:, :, skip:].shape
        index = labels[None, :, None, :].expand(layers, -1, queries, -1)
        logits = detections.logits[:, :, skip:].gather(-1, index)  # [L, B, Q, N]
        proposals = detections.proposal_logits[None, ..., None].expand(1, -1, -1, labels.shape[1])
        cost = self.costs.label * _focal_cost(torch.cat([logits, proposals]).float())

        boxes = torch.cat([detections.boxes[:, :, skip:], detections.proposal_boxes[None]])[:, :, :, None]
        truth = targets.boxes[None, :, None]  # [1, B, 1, N, 4]
        cost = cost + self.costs.l1 * (boxes - truth).abs().sum(-1)
        cost = cost - self.costs.giou * paired_giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(truth))
        # An empty slot costs the same everywhere, so it changes no other slot's match.
        empty = (targets.labels < 0)[None, :, None, :]
        return cost.float().masked_fill(empty, 0.0).nan_to_num(1e4, 1e4, 1e4)


def assign(table: Tensor) -> Tensor:
    """[L, B, Q, N] costs -> [L, B, N] each slot's query in the cheapest assignment; N at most Q.

    On a GPU where Triton is to be had, as with every PyTorch for CUDA on Linux: the host, which must hand out
    work ahead of the device, then never waits for it within a step.
    """
    if table.is_cuda and find_spec("triton") is not None:
        from smope.train.assign_triton import assign_on_device

        return assign_on_device(table)
    layers, images, queries, slots = table.shape
    # With no more slots than queries every slot is matched, and scipy returns the slots in order.
    problems = table.cpu().numpy().reshape(-1, queries, slots)
    chosen = np.stack([linear_sum_assignment(one.T)[1] for one in problems])
    return torch.from_numpy(chosen).view(layers, images, slots).to(table.device)


def _focal_cost(logits: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    p = logits.sigmoid()
    positive = alpha * (1 - p) ** gamma * -(p + 1e-8).log()
    negative = (1 - alpha) * p**gamma * -(1 - p + 1e-8).log()
    return positive - negative
